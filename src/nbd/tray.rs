//! Memory that is filled from its start, emptied and filled again, without being zeroed each time.

/// Bytes in a row. Behind them is what was there before, to be overwritten.
#[derive(Debug, Default)]
pub(super) struct Tray {
    memory: Vec<u8>,
    len: usize,
}

impl Tray {
    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.memory[..self.len]
    }

    pub(super) fn append(&mut self, bytes: &[u8]) {
        self.room(bytes.len()).copy_from_slice(bytes);
    }

    /// Appends `len` bytes of any content, and shows them.
    pub(super) fn room(&mut self, len: usize) -> &mut [u8] {
        let start = self.len;
        self.len += len;
        if self.memory.len() < self.len {
            self.memory.resize(self.len, 0);
        }
        &mut self.memory[start..self.len]
    }

    /// Takes back all but the first `len` bytes.
    pub(super) fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Takes the first `len` bytes away.
    pub(super) fn drop_front(&mut self, len: usize) {
        self.memory.copy_within(len..self.len, 0);
        self.len -= len;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_holds_what_was_put_there_last() {
        let mut tray = Tray::default();
        tray.append(b"abcdef");
        tray.drop_front(2);
        assert_eq!(tray.bytes(), b"cdef");
        tray.truncate(1);
        tray.append(b"xy");
        assert_eq!(tray.bytes(), b"cxy");
        assert_eq!(tray.room(2).len(), 2);
        tray.truncate(3);
        assert_eq!((tray.bytes(), tray.len()), (&b"cxy"[..], 3));
    }
}
