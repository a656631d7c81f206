//! GUIDs as Microsoft stores them: three numbers, little-endian, then eight bytes.

use std::fmt;

/// A GUID, in the order of its bytes in a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Guid(pub [u8; 16]);

/// Which digits each byte is, as it is written.
const ORDER: [usize; 16] = [3, 2, 1, 0, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15];

impl Guid {
    /// The one at a place; zeros where it is not there.
    pub(super) fn at(bytes: &[u8], at: usize) -> Self {
        Self(bytes.get(at..).and_then(|rest| rest.first_chunk()).copied().unwrap_or_default())
    }

    /// From the written form, with braces or without, in either case.
    pub const fn parse(text: &str) -> Option<Self> {
        let text = text.as_bytes();
        let mut guid = [0; 16];
        let (mut digits, mut at) = (0, 0);
        while at < text.len() {
            let value = match text[at] {
                digit @ b'0'..=b'9' => digit - b'0',
                digit @ b'a'..=b'f' => digit - b'a' + 10,
                digit @ b'A'..=b'F' => digit - b'A' + 10,
                b'-' | b'{' | b'}' => {
                    at += 1;
                    continue;
                }
                _ => return None,
            };
            if digits == 32 {
                return None;
            }
            let byte = ORDER[digits / 2];
            guid[byte] = guid[byte] << 4 | value;
            digits += 1;
            at += 1;
        }
        if digits == 32 { Some(Self(guid)) } else { None }
    }

    /// Whether it stands for nothing.
    pub fn is_zero(self) -> bool {
        self.0 == [0; 16]
    }
}

impl fmt::Display for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, byte) in ORDER.iter().enumerate() {
            if matches!(n, 4 | 6 | 8 | 10) {
                f.write_str("-")?;
            }
            write!(f, "{:02x}", self.0[*byte])?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn written_and_read_it_is_the_same() {
        let text = "2dc27766-f623-4200-9d64-115e9bfd4a08";
        let guid = Guid::parse(text).unwrap();
        assert_eq!(guid.0[..8], [0x66, 0x77, 0xc2, 0x2d, 0x23, 0xf6, 0x00, 0x42]);
        assert_eq!(guid.to_string(), text);
        assert_eq!(Guid::parse(&format!("{{{}}}", text.to_uppercase())), Some(guid));
        for bad in ["", "2dc27766", "2dc27766-f623-4200-9d64-115e9bfd4a0x", &format!("{text}0")] {
            assert_eq!(Guid::parse(bad), None);
        }
        assert!(Guid::default().is_zero() && !guid.is_zero());
    }
}
