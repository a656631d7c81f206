//! Sizes as people write and read them: `10G`, `1.5M`, `64k`; binary units throughout, as qemu-img has them.

/// Parses a size in bytes: digits, perhaps a fraction, perhaps one of `b k K M G T P E` (powers of 1024).
pub(crate) fn parse(text: &str) -> Result<u64, String> {
    let bad = || {
        format!("Invalid size '{text}': a number of bytes, or one with a suffix k, M, G, T, P or E (powers of 1024)")
    };
    if let Some(digits) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        // As QEMU has it: without a suffix, since some of those are digits.
        let bytes = u64::from_str_radix(digits, 16).map_err(|_| bad())?;
        return i64::try_from(bytes).map(|_| bytes).map_err(|_| bad());
    }
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match &text[digits.len()..] {
        "" | "b" | "B" => 0,
        "k" | "K" => 10,
        "m" | "M" => 20,
        "g" | "G" => 30,
        "t" | "T" => 40,
        "p" | "P" => 50,
        "e" | "E" => 60,
        _ => return Err(bad()),
    };
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    if whole.is_empty() && fraction.is_empty()
        || !whole.bytes().all(|b| b.is_ascii_digit())
        || !fraction.bytes().all(|b| b.is_ascii_digit())
    {
        return Err(bad());
    }
    // There is no part of a byte.
    if (fraction.bytes().any(|b| b != b'0') && shift == 0) || fraction.len() > 18 {
        return Err(bad());
    }
    let too_large = || format!("Size '{text}' is too large: the limit is 8 EiB - 1");
    let whole = if whole.is_empty() { "0" } else { whole };
    let whole: u128 = whole.parse().map_err(|_| too_large())?;
    let scale = 10_u128.pow(fraction.len() as u32);
    let fraction: u128 = if fraction.is_empty() { 0 } else { fraction.parse().map_err(|_| bad())? };
    let bytes = whole.checked_mul(1 << shift).ok_or_else(too_large)? + (fraction << shift) / scale;
    u64::try_from(bytes).ok().filter(|bytes| i64::try_from(*bytes).is_ok()).ok_or_else(too_large)
}

/// A size with three significant digits and its unit: `2.38 MiB`, `512 B`; 1000 of a unit are already 0.977 of the next.
pub(crate) fn human(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1000.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let decimals = if value >= 100.0 {
        0
    } else if value >= 10.0 {
        1
    } else if value >= 1.0 || bytes == 0 {
        2
    } else {
        3
    };
    let text = format!("{value:.decimals$}");
    let text = if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.') } else { &text };
    format!("{text} {}", UNITS[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_qemu_img_reads_them() {
        assert_eq!(parse("1000001"), Ok(1_000_001));
        assert_eq!(parse("64k"), Ok(65536));
        assert_eq!(parse("1.5G"), Ok(3 << 29));
        assert_eq!(parse("0"), Ok(0));
        assert_eq!(
            (parse("0x80"), parse(".5k"), parse("1024.0"), parse("1.k")),
            (Ok(128), Ok(512), Ok(1024), Ok(1024))
        );
        for bad in ["", "-1", "1.5", "4x", "k", "1 G", "0x", "0x1k", ".", "1..2G", "9E", "99999999999999999999"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn sizes_are_shown_with_three_digits() {
        assert_eq!(human(0), "0 B");
        assert_eq!(human(512), "512 B");
        assert_eq!(human(2_494_464), "2.38 MiB");
        assert_eq!(human(100 << 10), "100 KiB");
        assert_eq!(human(1000 << 10), "0.977 MiB");
        assert_eq!(human(20 << 20), "20 MiB");
        assert_eq!(human(68 << 40), "68 TiB");
    }
}
