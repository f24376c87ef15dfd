//! Files of images that an earlier version, a copy or a restore left readable by others.

use std::path::Path;

use crate::cache::{RAW_FILE, open::META_FILE};
use crate::config::StoreConfig;
use crate::disk::private::{Wider, narrow};
use crate::store::keys::ExportRoot;
use crate::units::ExportId;

/// Narrows every cache below the cache root, and the exports of a local store, and says so. The two roots themselves are
/// the user's: their modes stay.
pub(super) async fn mend(cache_root: &Path, store: &StoreConfig, exports: &ExportRoot) {
    let cache_root = cache_root.to_owned();
    let exports = match store {
        StoreConfig::Local(root) => Some(root.join(exports.prefix().as_str())),
        StoreConfig::Memory | StoreConfig::Remote(_) => None,
    };
    let mended = tokio::task::spawn_blocking(move || {
        mend_caches(&cache_root);
        if let Some(exports) = exports {
            let mut wider = Wider::default();
            if let Err(e) = narrow(&exports, &mut wider) {
                tracing::warn!("whether others may read {} is not known: {e}", exports.display());
            }
            wider.report("--local-root");
        }
    });
    if let Err(e) = mended.await {
        tracing::error!("the modes of files were not looked at: {e}");
    }
}

fn mend_caches(cache_root: &Path) {
    let mut wider = Wider::default();
    let entries = std::fs::read_dir(cache_root).into_iter().flatten().flatten();
    let is_export = |name: &std::ffi::OsStr| name.to_str().is_some_and(|name| name.parse::<ExportId>().is_ok());
    for folder in entries.filter(|entry| is_export(&entry.file_name())).map(|entry| entry.path()) {
        // Another folder in the cache root is none of ours.
        if ![META_FILE, RAW_FILE].iter().any(|file| folder.join(file).is_file()) {
            continue;
        }
        if let Err(e) = narrow(&folder, &mut wider) {
            tracing::warn!("whether others may read {} is not known: {e}", folder.display());
        }
    }
    wider.report("--cache-root");
}
