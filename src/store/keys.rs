//! Every key of the remote layout is built and parsed here, and nowhere else.
//!
//! ```text
//! <export-root>/<export_id>/volume.json
//! <export-root>/<export_id>/refs/current.json
//! <export-root>/<export_id>/snapshots/<snapshot_id>/manifest.json
//! <export-root>/<export_id>/snapshots/<snapshot_id>/delta.blob
//! <export-root>/<export_id>/snapshots/<snapshot_id>/base.blob
//! ```

use std::fmt;
use std::str::FromStr;

use crate::units::{ExportId, SnapshotId};

/// The longest key, in bytes: S3's own limit.
pub const MAX_KEY_BYTES: usize = 1024;

/// Why a text is not a key, or not one this server may touch.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// Empty, too long, a leading or trailing slash, an empty or dotted segment, a control character.
    #[error(
        "{0:?} is not an object key: use segments of printable ASCII joined by single slashes, none of them \".\" or \"..\", {MAX_KEY_BYTES} bytes at most"
    )]
    Malformed(String),
    /// Outside the export root: an object of somebody else.
    #[error("object key {key:?} is outside the export root {root:?}")]
    OutsideRoot {
        /// The key as found.
        key: String,
        /// The root it should be under.
        root: String,
    },
}

/// The name of an object, or of a folder of objects: segments joined by `/`, no empty or dotted ones.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key(String);

impl Key {
    /// The key as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    fn join(&self, rest: &str) -> Self {
        Self(format!("{}/{rest}", self.0))
    }
}

impl FromStr for Key {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, KeyError> {
        let segment = |s: &str| !s.is_empty() && s != "." && s != ".." && s.bytes().all(|c| (0x20..0x7f).contains(&c));
        if text.len() <= MAX_KEY_BYTES && text.split('/').all(segment) {
            Ok(Self(text.to_owned()))
        } else {
            Err(KeyError::Malformed(text.chars().take(160).collect()))
        }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The folder all exports of a server live under.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportRoot(Key);

impl ExportRoot {
    /// The root at a prefix such as `exports` or `team-a/disks`.
    #[must_use]
    pub fn new(prefix: Key) -> Self {
        Self(prefix)
    }

    /// The folder itself.
    #[must_use]
    pub fn prefix(&self) -> &Key {
        &self.0
    }

    /// Where the objects of one export are.
    #[must_use]
    pub fn export(&self, id: &ExportId) -> ExportKeys {
        ExportKeys { prefix: self.0.join(id.as_str()) }
    }

    /// Where the start-up probe writes its own objects: a name no export can have.
    #[must_use]
    pub fn probe(&self, name: &str) -> Key {
        self.0.join(&format!(".probe/{name}"))
    }

    /// The object under this root that a key in a file means, wherever the file was written.
    ///
    /// A key that ends as those of the layout do, in `<export_id>/snapshots/<snapshot_id>/<file>`, is that object of this
    /// root: a store that was copied to another prefix is whole there, and uses nothing of what it was copied from. Any
    /// other key is meant to the letter.
    ///
    /// # Errors
    /// [`KeyError`] if the text is no key, or a key of no object under this root.
    pub fn resolve(&self, text: &str) -> Result<Key, KeyError> {
        let key: Key = text.parse()?;
        if let Some(moved) = self.of_layout(&key) {
            return Ok(moved);
        }
        let inside = key.0.strip_prefix(self.0.as_str()).is_some_and(|rest| rest.starts_with('/'));
        if inside { Ok(key) } else { Err(KeyError::OutsideRoot { key: key.0, root: self.0.0.clone() }) }
    }

    fn of_layout(&self, key: &Key) -> Option<Key> {
        let mut from_the_end = key.0.rsplit('/');
        let mut segment = || from_the_end.next();
        let (file, snapshot, folder, export) = (segment()?, segment()?, segment()?, segment()?);
        let (snapshot, export) = (snapshot.parse().ok()?, export.parse().ok()?);
        let keys = (folder == "snapshots").then(|| self.export(&export))?;
        [keys.manifest(snapshot), keys.delta(snapshot), keys.base(snapshot)]
            .into_iter()
            .find(|key| key.0.rsplit('/').next() == Some(file))
    }
}

/// The keys of one export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportKeys {
    prefix: Key,
}

impl ExportKeys {
    /// The folder of all of the export's objects.
    #[must_use]
    pub fn prefix(&self) -> &Key {
        &self.prefix
    }

    /// `volume.json`: the mutable head.
    #[must_use]
    pub fn head(&self) -> Key {
        self.prefix.join("volume.json")
    }

    /// `refs/current.json`: the copy of the head for readers of the older direct mode.
    #[must_use]
    pub fn current_ref(&self) -> Key {
        self.prefix.join("refs/current.json")
    }

    /// `snapshots/<id>/manifest.json`.
    #[must_use]
    pub fn manifest(&self, snapshot: SnapshotId) -> Key {
        self.prefix.join(&format!("snapshots/{snapshot}/manifest.json"))
    }

    /// `snapshots/<id>/delta.blob`.
    #[must_use]
    pub fn delta(&self, snapshot: SnapshotId) -> Key {
        self.prefix.join(&format!("snapshots/{snapshot}/delta.blob"))
    }

    /// `snapshots/<id>/base.blob`.
    #[must_use]
    pub fn base(&self, snapshot: SnapshotId) -> Key {
        self.prefix.join(&format!("snapshots/{snapshot}/base.blob"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root(prefix: &str) -> ExportRoot {
        ExportRoot::new(prefix.parse().unwrap())
    }

    fn id(text: &str) -> ExportId {
        text.parse().unwrap()
    }

    #[test]
    fn a_key_is_segments_joined_by_single_slashes() {
        for good in ["a", "a/b", "exports/vm-1/volume.json", "a b/c", "..a", "...", "a.", ".hidden", "~!@#$%^&*()"] {
            assert_eq!(good.parse::<Key>().unwrap().to_string(), good);
        }
        for bad in [
            "",
            "/",
            "/a",
            "a/",
            "a//b",
            ".",
            "..",
            "a/.",
            "a/../b",
            "../a",
            "a\nb",
            "a\0b",
            "a\u{7f}",
            "ä",
            "a/\u{202e}",
        ] {
            assert_eq!(bad.parse::<Key>(), Err(KeyError::Malformed(bad.into())), "{bad:?}");
        }
    }

    #[test]
    fn a_key_has_at_most_the_length_s3_allows() {
        assert!("x".repeat(MAX_KEY_BYTES).parse::<Key>().is_ok());
        let error = "x".repeat(MAX_KEY_BYTES + 1).parse::<Key>().unwrap_err();
        // The text of the error stays short, whatever was in the manifest.
        assert!(error.to_string().len() < 500, "{error}");
    }

    #[test]
    fn the_layout_is_the_one_in_existing_buckets() {
        let snapshot: SnapshotId = "0190c2a0a1b27c3d8e4f5a6b7c8d9e0f".parse().unwrap();
        let keys = root("team-a/exports").export(&id("vm-1"));
        for (key, expected) in [
            (keys.prefix().clone(), "team-a/exports/vm-1"),
            (keys.head(), "team-a/exports/vm-1/volume.json"),
            (keys.current_ref(), "team-a/exports/vm-1/refs/current.json"),
            (keys.manifest(snapshot), "team-a/exports/vm-1/snapshots/0190c2a0a1b27c3d8e4f5a6b7c8d9e0f/manifest.json"),
            (keys.delta(snapshot), "team-a/exports/vm-1/snapshots/0190c2a0a1b27c3d8e4f5a6b7c8d9e0f/delta.blob"),
            (keys.base(snapshot), "team-a/exports/vm-1/snapshots/0190c2a0a1b27c3d8e4f5a6b7c8d9e0f/base.blob"),
        ] {
            assert_eq!(key.as_str(), expected);
        }
    }

    #[test]
    fn every_key_built_is_a_key_when_parsed_and_inside_its_root() {
        let root = root("exports");
        let longest = id(&"x".repeat(crate::units::MAX_EXPORT_ID_BYTES));
        let keys = root.export(&longest);
        let snapshot = SnapshotId::generate();
        for key in [
            keys.prefix().clone(),
            keys.head(),
            keys.current_ref(),
            keys.manifest(snapshot),
            keys.delta(snapshot),
            keys.base(snapshot),
            root.probe("name"),
        ] {
            assert_eq!(root.resolve(key.as_str()), Ok(key));
        }
    }

    #[test]
    fn a_key_outside_the_root_is_somebody_elses() {
        let root = root("exports");
        assert!(root.resolve("exports/other-vm/snapshots/1/base.blob").is_ok());
        for outside in ["exports", "exports-2/vm/volume.json", "elsewhere/exports/vm", "export", "secrets"] {
            let error = root.resolve(outside).unwrap_err();
            assert!(matches!(error, KeyError::OutsideRoot { .. }), "{outside}: {error}");
            assert!(error.to_string().contains(outside) && error.to_string().contains("exports"), "{error}");
        }
        for malformed in ["exports/../secrets", "/exports/vm", "exports//vm", "exports/vm/"] {
            assert!(matches!(root.resolve(malformed), Err(KeyError::Malformed(_))), "{malformed}");
        }
    }

    #[test]
    fn a_key_of_the_layout_is_that_object_of_this_root_whatever_root_it_was_written_under() {
        let tail = "vm-1/snapshots/0190c2a0a1b27c3d8e4f5a6b7c8d9e0f";
        for file in ["delta.blob", "base.blob", "manifest.json"] {
            for old in ["exports", "a/exports", "restored", "restored/exports", "restored/snapshots", "~!@#$%^&*()"] {
                let found = root("restored").resolve(&format!("{old}/{tail}/{file}"));
                assert_eq!(found.unwrap().as_str(), format!("restored/{tail}/{file}"), "{old}");
            }
        }
        // An export may have the name of the folder.
        let odd = "exports/snapshots/snapshots/0190c2a0a1b27c3d8e4f5a6b7c8d9e0f/base.blob";
        assert_eq!(root("b").resolve(odd).unwrap().as_str(), odd.replacen("exports", "b", 1));
    }

    #[test]
    fn a_key_that_only_resembles_the_layout_is_meant_to_the_letter() {
        let snapshot = "0190c2a0a1b27c3d8e4f5a6b7c8d9e0f";
        for tail in [
            format!("vm-1/snapshots/{snapshot}/other.blob"),
            format!("vm-1/snapshots/{snapshot}/delta.blob/x"),
            format!("vm-1/snapshots/{}/delta.blob", &snapshot[1..]),
            format!("vm-1/Snapshots/{snapshot}/delta.blob"),
            format!("-vm/snapshots/{snapshot}/delta.blob"),
            format!("v..m/snapshots/{snapshot}/delta.blob"),
            format!("{}/snapshots/{snapshot}/delta.blob", "x".repeat(crate::units::MAX_EXPORT_ID_BYTES + 1)),
            "vm-1/flat.img".to_owned(),
        ] {
            let inside = format!("restored/{tail}");
            assert_eq!(root("restored").resolve(&inside).unwrap().as_str(), inside);
            let outside = root("restored").resolve(&format!("exports/{tail}"));
            assert!(matches!(outside, Err(KeyError::OutsideRoot { .. })), "{outside:?}");
        }
        let dotted = format!("exports/../vm-1/snapshots/{snapshot}/delta.blob");
        assert!(matches!(root("restored").resolve(&dotted), Err(KeyError::Malformed(_))));
    }

    #[test]
    fn no_export_can_have_the_name_of_the_probes_folder() {
        let probe = root("exports").probe("x");
        let folder = probe.as_str().split('/').nth(1).unwrap();
        assert!(folder.parse::<ExportId>().is_err(), "{folder}");
    }
}
