//! Sizes as people write and read them, always in powers of 1024.

/// A count of bytes: `10G`, `512MiB`, `4096`.
///
/// # Errors
/// A text that says what to write instead.
pub fn parse(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = text[digits.len()..].to_ascii_lowercase();
    let shift = match unit.as_str() {
        "" | "b" => 0,
        "k" | "kib" => 10,
        "m" | "mib" => 20,
        "g" | "gib" => 30,
        "t" | "tib" => 40,
        "p" | "pib" => 50,
        "e" | "eib" => 60,
        "kb" | "mb" | "gb" | "tb" | "pb" | "eb" => {
            let letter = unit[..1].to_ascii_uppercase();
            return Err(format!("{unit} means 1000s to some and 1024s to others: write {letter}iB for powers of 1024"));
        }
        _ => return Err("give bytes, or a number with a unit, such as 10G or 512MiB".into()),
    };
    let count: u64 = digits.parse().map_err(|_| "give a whole number, such as 10G, 512MiB or 1073741824")?;
    count.checked_mul(1 << shift).ok_or_else(|| "that is more than there can be".into())
}

/// As people read it: `10 GiB`, `1.5 MiB`, `512 B`.
pub fn shown(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    // In tenths, rounded down; a size just below a unit stays below it.
    let mut tenths = u128::from(bytes) * 10 / 1024;
    let mut unit = 0;
    while tenths >= 10 * 1024 && unit + 1 < UNITS.len() {
        tenths /= 1024;
        unit += 1;
    }
    let (whole, tenth) = (tenths / 10, tenths % 10);
    if tenth == 0 { format!("{whole} {}", UNITS[unit]) } else { format!("{whole}.{tenth} {}", UNITS[unit]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_powers_of_1024_in_either_case_and_spelling() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("1b", 1),
            ("1k", 1 << 10),
            ("10G", 10 << 30),
            ("512MiB", 512 << 20),
            ("2tib", 2 << 40),
            ("1P", 1 << 50),
            ("7E", 7 << 60),
        ] {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_refused_with_what_to_write() {
        for text in ["", "G", "-1", "1.5G", "1 G", "10X", "99999999999E", "16E"] {
            assert!(parse(text).is_err(), "{text}");
        }
        assert!(parse("10GB").unwrap_err().contains("GiB"));
    }

    #[test]
    fn sizes_are_shown_in_the_largest_unit_that_fits() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            ((1 << 20) - 1, "1023.9 KiB"),
            (10 << 30, "10 GiB"),
            (u64::MAX, "15.9 EiB"),
        ] {
            assert_eq!(shown(bytes), text);
        }
    }
}
