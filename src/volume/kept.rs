//! What a user decided about the exports of a cache root and a restart keeps: which are closed, and which are read-only.
//!
//! It is in one small file of the cache root, which is replaced durably before a decision takes effect, on a full disk as
//! well. In a fresh cache root every export is open and writable.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::Services;
use super::open::local_error;
use super::registry::ExportError;
use crate::cache::reserved::Reserved;
use crate::cache::{self, disk_error};
use crate::manifest::format::from_json;
use crate::units::ExportId;

const VERSION: u64 = 1;

/// The file. Its name is none that an export can have.
const FILE: Reserved =
    Reserved { name: ".exports.json", spares: [".exports.json.spare", ".exports.json.spare2"], max_bytes: 16 << 20 };

/// How an export is here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kept {
    Open { read_only: bool },
    Closed,
}

/// The exports that are not open and writable.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct KeptStates {
    version: u64,
    closed: BTreeSet<ExportId>,
    read_only: BTreeSet<ExportId>,
}

impl KeptStates {
    /// Those of a cache root.
    ///
    /// # Errors
    /// [`ExportError::Damaged`] if the file is not as this server writes it.
    pub(super) async fn load(services: &Services, root: &Path) -> Result<Self, ExportError> {
        let path = root.join(FILE.name);
        let refused = |why: String| {
            let text = format!(
                "{}: {why}; it says which exports are closed or read-only: restore it, or remove it to have all of them open \
                 and writable",
                path.display()
            );
            ExportError::Damaged(text.into())
        };
        let (disk, dir) = (Arc::clone(&services.disk), root.to_owned());
        let found = cache::blocking_io(move || FILE.load(&*disk, &dir)).await.map_err(|e| refused(e.to_string()))?;
        let Some(bytes) = found else { return Ok(Self::default()) };
        let states: Self = from_json(&bytes).map_err(refused)?;
        if states.version != VERSION {
            return Err(refused(format!("its version is {}, this server knows {VERSION}", states.version)));
        }
        Ok(states)
    }

    /// How an export is here.
    pub(super) fn of(&self, id: &ExportId) -> Kept {
        if self.closed.contains(id) { Kept::Closed } else { Kept::Open { read_only: self.read_only.contains(id) } }
    }

    /// Has an export be so from now on, durably.
    ///
    /// # Errors
    /// Those of the disk; then it is as it was.
    pub(super) async fn keep(
        &mut self,
        services: &Services,
        root: &Path,
        id: &ExportId,
        kept: Kept,
    ) -> Result<(), ExportError> {
        if self.of(id) == kept {
            return Ok(());
        }
        let mut next = Self { version: VERSION, ..self.clone() };
        next.closed.remove(id);
        next.read_only.remove(id);
        match kept {
            Kept::Closed => next.closed.insert(id.clone()),
            Kept::Open { read_only: true } => next.read_only.insert(id.clone()),
            Kept::Open { read_only: false } => false,
        };
        let bytes = serde_json::to_vec_pretty(&next).map_err(ExportError::damaged)?;
        let (disk, dir) = (Arc::clone(&services.disk), root.to_owned());
        let stored = cache::blocking_io(move || FILE.store(&*disk, &dir, &bytes)).await;
        stored.map_err(|e| local_error(id, disk_error("write", &root.join(FILE.name), e)))?;
        *self = next;
        Ok(())
    }
}

/// Takes the room that the file needs, while there is any. If there is none, a decision finds out.
pub(super) async fn reserve(services: &Services, root: &Path) {
    let (disk, dir) = (Arc::clone(&services.disk), root.to_owned());
    if let Err(e) = cache::blocking_io(move || FILE.reserve(&*disk, &dir)).await {
        tracing::warn!("no room was taken for {} in {}: {e}", FILE.name, root.display());
    }
}
