//! A change of the image: a write, a zeroing, a trim.
//!
//! A change stands in line from its arrival ([`Volume::change`]), not from when its work begins: whatever thread takes
//! it up, and however late, nothing that arrived after it and overlaps goes first (L11).

use std::sync::Arc;

use bytes::Bytes;
use tokio::runtime::Handle;

use super::order::Turn;
use super::{Volume, VolumeError};
use crate::cache::{self, Cache, Edges, Progress};
use crate::units::{ByteRange, ChunkIndex};

/// A change that has arrived. It leaves the line when it is done or dropped.
#[derive(Debug)]
pub struct Change {
    pub(super) volume: Arc<Volume>,
    pub(super) range: ByteRange,
    pub(super) turn: Turn,
}

impl Change {
    /// Writes `data`, which is as long as the range.
    ///
    /// # Errors
    /// Any [`VolumeError`]; then an unknown part of the range has the new content.
    pub async fn write(mut self, data: Bytes) -> Result<(), VolumeError> {
        // The turn before the door: who waits for a turn inside would be waited for by who closes the volume, while the
        // change before it waits outside.
        self.turn.come().await;
        let (volume, range) = (&self.volume, self.range);
        let _open = volume.enter_to_write(range).await?;
        volume.fill_all(self.cut_chunks()).await?;
        volume
            .until_done(range, move |cache, volume, rest| {
                let from = super::buffer_len_of(rest.offset() - range.offset());
                cache.write(rest.offset(), &data[from..], |chunk| volume.is_zero(chunk))
            })
            .await
    }

    /// As [`write`](Self::write); `done` is called with the result, on the thread that has it: where only the disk has to be
    /// waited for, each change of threads may take longer than the disk. It is dropped uncalled only if the runtime ends.
    pub fn write_then(self, data: Bytes, done: impl FnOnce(Result<(), VolumeError>) + Send + 'static) {
        let (cache, runtime) = (Arc::clone(&self.volume.cache), Handle::current());
        cache::blocking_then(&cache, move |cache| {
            if let Some(written) = self.write_to_disk(cache, &data) {
                drop(self);
                done(written);
            } else {
                runtime.spawn(async move { done(self.write(data).await) });
            }
        });
    }

    /// Writes `data`; `None` if something else than the disk has to be waited for, or to be found out about.
    fn write_to_disk(&self, cache: &Cache, data: &[u8]) -> Option<Result<(), VolumeError>> {
        // Not waiting: who closes the volume needs a thread like this one.
        let _open = self.volume.enter_to_write_at_once(self.range)?;
        // What has to be fetched is, before any of the range is written.
        if !self.turn.has_come() || self.cut_chunks().any(|chunk| self.volume.must_fetch(chunk)) {
            return None;
        }
        match cache.write(self.range.offset(), data, |chunk| self.volume.is_zero(chunk)) {
            Ok(Progress::Done) => Some(Ok(())),
            Ok(Progress::NeedsFill { .. }) => None,
            Err(e) => Some(Err(self.volume.cache_error(e))),
        }
    }

    /// The chunks that the range begins or ends inside of.
    fn cut_chunks(&self) -> impl Iterator<Item = ChunkIndex> + use<> {
        let edges = [self.range.offset(), self.range.end()];
        edges.map(|edge| self.volume.chunk_cut_by(edge)).into_iter().flatten()
    }

    /// Makes the range read as zeros. Whole chunks cost neither a fetch nor space.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub async fn write_zeroes(self) -> Result<(), VolumeError> {
        self.zero(Edges::Zero).await
    }

    /// Lets go of the range's content: it reads as zeros, except for the edges of chunks that are not here.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub async fn trim(self) -> Result<(), VolumeError> {
        self.zero(Edges::Skip).await
    }

    async fn zero(mut self, edges: Edges) -> Result<(), VolumeError> {
        self.turn.come().await;
        let _open = self.volume.enter_to_write(self.range).await?;
        self.volume
            .until_done(self.range, move |cache, volume, rest| cache.zero(rest, edges, |chunk| volume.is_zero(chunk)))
            .await
    }
}
