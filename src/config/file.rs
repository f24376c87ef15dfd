//! The configuration file: TOML, one line per setting, each named as its flag without the dashes.
//!
//! Only the form is judged here: which keys there are and what a value means is for the flags themselves to say, so that
//! a setting is the same wherever it comes from.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use toml::de::{DeTable, DeValue};

/// The longest file that is read, in bytes: all settings together are far shorter.
pub const MAX_FILE_BYTES: u64 = 1 << 20;

/// One setting as written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Setting {
    pub(super) key: String,
    /// Several if it is an array.
    pub(super) values: Vec<String>,
    pub(super) line: usize,
}

/// A file whose form is right.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Settings {
    pub(super) path: PathBuf,
    pub(super) settings: Vec<Setting>,
}

/// Why a configuration file is refused. Each text is one line with the place and the remedy.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// It cannot be read.
    #[error("--config {path} cannot be read ({source}): name a file that this user may read", path = .path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// It is not what a configuration can be.
    #[error("--config {path} is no text of at most {MAX_FILE_BYTES} bytes: name a configuration file", path = .0.display())]
    NoText(PathBuf),
    /// One of its lines cannot be used.
    #[error("{path} line {line}: {reason}", path = .path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// The first line is 1.
        line: usize,
        /// What is wrong and what to do.
        reason: String,
    },
}

impl Settings {
    pub(super) fn read(path: &Path) -> Result<Self, FileError> {
        let mut bytes = Vec::new();
        let read = File::open(path).and_then(|file| file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes));
        read.map_err(|source| FileError::Unreadable { path: path.to_owned(), source })?;
        match String::from_utf8(bytes) {
            Ok(text) if text.len() as u64 <= MAX_FILE_BYTES => Self::parse(path, &text),
            _ => Err(FileError::NoText(path.to_owned())),
        }
    }

    fn parse(path: &Path, text: &str) -> Result<Self, FileError> {
        let line_at = |at: usize| text.bytes().take(at).filter(|b| *b == b'\n').count() + 1;
        let refused = |at: usize, reason: String| FileError::Line { path: path.to_owned(), line: line_at(at), reason };
        let table = DeTable::parse(text).map_err(|e| {
            let at = e.span().map_or(0, |span| span.start);
            refused(at, format!("this is no TOML: {}; write KEY = VALUE", e.message()))
        })?;
        let mut settings = Vec::new();
        for (key, value) in table.into_inner() {
            let values = values(value.get_ref()).ok_or_else(|| {
                let kind = value.get_ref().type_str();
                let reason = format!(
                    "{} is a {kind}: give a text, a whole number, true or false, or an array of them",
                    key.get_ref()
                );
                refused(key.span().start, reason)
            })?;
            settings.push(Setting { line: line_at(key.span().start), key: key.into_inner().into_owned(), values });
        }
        settings.sort_by_key(|setting| setting.line);
        Ok(Self { path: path.to_owned(), settings })
    }

    pub(super) fn refused(&self, setting: &Setting, reason: String) -> FileError {
        FileError::Line { path: self.path.clone(), line: setting.line, reason }
    }
}

/// The texts that a flag would get; `None` for what no flag takes.
fn values(value: &DeValue<'_>) -> Option<Vec<String>> {
    match value {
        DeValue::Array(items) => items.iter().map(|item| scalar(item.get_ref())).collect(),
        one => Some(vec![scalar(one)?]),
    }
}

fn scalar(value: &DeValue<'_>) -> Option<String> {
    match value {
        DeValue::String(text) => Some(text.to_string()),
        DeValue::Integer(number) => i128::from_str_radix(number.as_str(), number.radix()).ok().map(|n| n.to_string()),
        DeValue::Boolean(flag) => Some(flag.to_string()),
        DeValue::Float(_) | DeValue::Datetime(_) | DeValue::Array(_) | DeValue::Table(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Vec<(String, Vec<String>, usize)>, String> {
        let parsed = Settings::parse(Path::new("/etc/n.toml"), text).map_err(|e| e.to_string())?;
        Ok(parsed.settings.into_iter().map(|s| (s.key, s.values, s.line)).collect())
    }

    #[test]
    fn each_setting_has_its_texts_and_its_line() {
        let text = "# first\nbucket = 'b'\n\nstore-timeout = 1_0\nlisten = [\n  \"a\", # one\n  \"b\",\n]\nx = true\nh = 0x10\n";
        let one = |key: &str, value: &str, line| (key.to_owned(), vec![value.to_owned()], line);
        let listen = ("listen".to_owned(), vec!["a".to_owned(), "b".to_owned()], 5);
        let expected =
            [one("bucket", "b", 2), one("store-timeout", "10", 4), listen, one("x", "true", 9), one("h", "16", 10)];
        assert_eq!(parse(text).unwrap(), expected);
        assert_eq!(parse("").unwrap(), []);
    }

    #[test]
    fn what_cannot_be_a_setting_is_refused_with_its_line() {
        for (text, parts) in [
            ("\nbucket", &["/etc/n.toml line 2", "KEY = VALUE"][..]),
            ("bucket = b", &["line 1", "no TOML"]),
            ("a = 1\na = 2", &["line 2", "duplicate key"]),
            ("a = 1\n[tls]\ncert = 'x'", &["line 2", "tls is a table"]),
            ("a = 1\nb = 1.5", &["line 2", "b is a float"]),
            ("a = [['x']]", &["line 1", "a is a array"]),
            ("a = 2020-01-01", &["a is a datetime"]),
        ] {
            let refused = parse(text).unwrap_err();
            assert!(parts.iter().all(|part| refused.contains(part)), "{text:?}: {refused}");
            assert_eq!(refused.lines().count(), 1, "{refused}");
        }
    }
}
