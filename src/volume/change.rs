//! A change of the image: a write, a zeroing, a trim.
//!
//! A change stands in line from its arrival ([`Volume::change`]), not from when its work begins: whatever thread takes
//! it up, and however late, nothing that arrived after it and overlaps goes first (L11).

use std::sync::Arc;

use bytes::Bytes;

use super::order::Turn;
use super::{Volume, VolumeError};
use crate::cache::Edges;
use crate::units::ByteRange;

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
        let partial = [range.offset(), range.end()].map(|edge| volume.chunk_cut_by(edge));
        volume.fill_all(partial.into_iter().flatten()).await?;
        volume
            .until_done(range, move |cache, volume, rest| {
                let from = super::buffer_len_of(rest.offset() - range.offset());
                cache.write(rest.offset(), &data[from..], |chunk| volume.is_zero(chunk))
            })
            .await
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
