//! A volume is one open export: its cache on local disk, its published image in the store, and the rules between them.

pub mod registry;

use std::sync::Arc;

use bytes::Bytes;

use crate::units::{ByteRange, ExportId, Geometry};

/// Why a volume did not do what was asked, by what the caller tells its client.
#[derive(Debug, Clone, thiserror::Error)]
pub enum VolumeError {
    /// The range leaves the image. Front ends check first; this is the second fence.
    #[error("range {range} leaves the image of {image_size} bytes")]
    OutOfRange {
        /// The range asked for.
        range: ByteRange,
        /// The image's size in bytes.
        image_size: u64,
    },
    /// The export is attached read-only.
    #[error("export {0} is read-only")]
    ReadOnly(ExportId),
    /// The local disk is full; nothing is lost and it works again once space is back.
    #[error("no space left for the cache of export {0}: free some under --cache-root and repeat")]
    NoSpace(ExportId),
    /// A missing chunk could not be had from the store in time, or what came was not what was published.
    #[error("{0}")]
    Unavailable(Arc<str>),
    /// The local disk failed for good: the export takes no more writes until an operator acts.
    #[error("{0}")]
    Failed(Arc<str>),
    /// The export was unloaded or the server is stopping.
    #[error("export {0} is closed")]
    Closed(ExportId),
}

/// What the cache holds of a stretch of the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Residency {
    /// Published content that is not here: a read fetches it.
    Absent,
    /// Reads as zeros and nothing is stored anywhere for it. `dirty`: the zeros are not published yet.
    Zero {
        /// Whether the next snapshot changes it.
        dirty: bool,
    },
    /// Here, and the same as published.
    Clean,
    /// Here, and different from what is published.
    Dirty,
}

/// A stretch of the image with one residency.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Its length in bytes, not 0.
    pub len: u64,
    /// What the cache holds of it.
    pub residency: Residency,
}

/// One open export.
#[derive(Debug)]
pub struct Volume {}

impl Volume {
    /// The export's name.
    pub fn export_id(&self) -> &ExportId {
        todo!()
    }
    /// The size of the image and of its chunks.
    pub fn geometry(&self) -> Geometry {
        todo!()
    }
    /// Whether writes are refused.
    pub fn read_only(&self) -> bool {
        todo!()
    }
    /// The bytes of a range.
    pub async fn read(self: &Arc<Self>, range: ByteRange) -> Result<Bytes, VolumeError> {
        let _ = range;
        todo!()
    }
    /// Writes `data` at `offset`.
    pub async fn write(self: &Arc<Self>, offset: u64, data: Bytes) -> Result<(), VolumeError> {
        let _ = (offset, data);
        todo!()
    }
    /// Makes a range read as zeros.
    pub async fn write_zeroes(self: &Arc<Self>, range: ByteRange) -> Result<(), VolumeError> {
        let _ = range;
        todo!()
    }
    /// Lets go of a range's content where that is cheap.
    pub async fn trim(self: &Arc<Self>, range: ByteRange) -> Result<(), VolumeError> {
        let _ = range;
        todo!()
    }
    /// Makes every write that was replied to durable on the local disk.
    pub async fn flush(self: &Arc<Self>) -> Result<(), VolumeError> {
        todo!()
    }
    /// Fetches what is missing of a range; a failed fetch is no error.
    pub async fn prefetch(self: &Arc<Self>, range: ByteRange) -> Result<(), VolumeError> {
        let _ = range;
        todo!()
    }
    /// The range's extents in order, neighbours of one residency merged, at most `max` of them; they cover the range
    /// from its start, and all of it unless `max` cut them short. `max` is at least 1.
    pub async fn extents(self: &Arc<Self>, range: ByteRange, max: usize) -> Result<Vec<Extent>, VolumeError> {
        let _ = (range, max);
        todo!()
    }
}
