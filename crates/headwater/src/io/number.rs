//! Numbers as qemu-io reads and writes them.

/// Reads a number of bytes: decimal or `0x…`, perhaps with a suffix k, M, G, T, P, E.
pub(crate) fn parse(word: &str) -> Result<u64, String> {
    let refused = || format!("Parsing error: non-numeric argument, or extraneous/unrecognized suffix -- {word}");
    let (digits, radix) = match word.strip_prefix("0x").or_else(|| word.strip_prefix("0X")) {
        Some(hex) => (hex, 16),
        None => (word, 10),
    };
    if radix == 16 {
        return u64::from_str_radix(digits, radix).map_err(|_| refused());
    }
    crate::size::parse(digits).map_err(|_| refused())
}

/// A number with its unit: `64 KiB`, `1.500 GiB`, `512 bytes`.
pub(crate) fn with_unit(value: f64) -> String {
    const UNITS: [(f64, &str); 6] = [
        (1_152_921_504_606_846_976.0, "EiB"),
        (1_125_899_906_842_624.0, "PiB"),
        (1_099_511_627_776.0, "TiB"),
        (1_073_741_824.0, "GiB"),
        (1_048_576.0, "MiB"),
        (1024.0, "KiB"),
    ];
    let (size, unit) = UNITS.into_iter().find(|(size, _)| value >= *size).unwrap_or((1.0, "bytes"));
    let text = format!("{:.3}", value / size);
    format!("{} {unit}", text.strip_suffix(".000").unwrap_or(&text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_read_and_written_as_qemu_io_does() {
        assert_eq!(parse("64k"), Ok(65536));
        assert_eq!(parse("0x10000"), Ok(65536));
        assert_eq!(parse("1.5M"), Ok(3 << 19));
        assert!(parse("abc").unwrap_err().ends_with("-- abc"));
        assert!(parse("-1").is_err());
        assert_eq!(with_unit(65536.0), "64 KiB");
        assert_eq!(with_unit(512.0), "512 bytes");
        assert_eq!(with_unit(1536.0 * 1024.0), "1.500 MiB");
        assert_eq!(with_unit(0.0), "0 bytes");
    }
}
