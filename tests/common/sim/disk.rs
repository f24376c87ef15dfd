//! The simulated host's disk and its open files.

use std::io;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use nbd_server::disk::{Disk, DiskFile};
use nbd_server::units::ByteRange;

use super::faults::{DiskFault, eio, full, half};
use super::{Event, Inner, SECTOR, Sim};

#[derive(Debug, Clone)]
pub struct SimDisk(pub Arc<Sim>);

#[derive(Debug)]
struct SimFile {
    sim: Arc<Sim>,
    node: usize,
}

fn not_found() -> io::Error {
    io::ErrorKind::NotFound.into()
}

impl Inner {
    /// The next call of the disk; what needs no new space does not notice a full one.
    fn disk_call(&mut self) -> io::Result<()> {
        match self.faults.next_disk_call() {
            None | Some(DiskFault::Full) => Ok(()),
            Some(DiskFault::Eio | DiskFault::Short) => Err(eio()),
        }
    }

    /// The next call of the disk, which needs a new name or file.
    fn disk_call_for_a_name(&mut self) -> io::Result<()> {
        match self.faults.next_disk_call() {
            None => Ok(()),
            Some(DiskFault::Full) => Err(full()),
            Some(DiskFault::Eio | DiskFault::Short) => Err(eio()),
        }
    }

    fn record_on_disk(&mut self, event: Event) -> io::Result<()> {
        self.disk_call()?;
        self.record(event);
        Ok(())
    }

    /// How many of the sectors from `offset` on have their space, in bytes.
    fn allocated_from(&self, node: usize, offset: u64, len: usize) -> usize {
        let first = offset / SECTOR as u64;
        let sectors = (offset + len as u64).div_ceil(SECTOR as u64) - first;
        let there = (first..first + sectors).take_while(|sector| self.allocated[node].contains(sector)).count();
        let end = (first + there as u64) * SECTOR as u64;
        usize::try_from(end.saturating_sub(offset)).unwrap().min(len)
    }

    fn take_space(&mut self, node: usize, offset: u64, len: u64) {
        let sectors = offset / SECTOR as u64..(offset + len).div_ceil(SECTOR as u64);
        self.allocated[node].extend(sectors);
    }
}

impl Disk for SimDisk {
    fn open(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        let inner = &mut *self.0.0.lock().unwrap();
        inner.disk_call()?;
        let node = *inner.walk.live.names.get(path).ok_or_else(not_found)?;
        Ok(Arc::new(SimFile { sim: Arc::clone(&self.0), node }))
    }

    fn create(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        let inner = &mut *self.0.0.lock().unwrap();
        inner.disk_call_for_a_name()?;
        let node = inner.walk.live.files.len();
        inner.allocated.resize_with(node + 1, Default::default);
        inner.record(Event::Create { path: path.to_owned(), node });
        Ok(Arc::new(SimFile { sim: Arc::clone(&self.0), node }))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let event = Event::Rename { from: from.to_owned(), to: to.to_owned() };
        self.0.0.lock().unwrap().record_on_disk(event)
    }

    fn exchange(&self, a: &Path, b: &Path) -> io::Result<()> {
        self.0.0.lock().unwrap().record_on_disk(Event::Exchange { a: a.to_owned(), b: b.to_owned() })
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let inner = &mut *self.0.0.lock().unwrap();
        inner.disk_call()?;
        if inner.walk.live.names.contains_key(path) {
            inner.record(Event::Remove { path: path.to_owned() });
        }
        Ok(())
    }

    fn create_dir(&self, _: &Path) -> io::Result<()> {
        self.0.0.lock().unwrap().disk_call_for_a_name()
    }

    fn remove_dir(&self, _: &Path) -> io::Result<()> {
        self.0.0.lock().unwrap().disk_call()
    }

    fn list_dir(&self, path: &Path) -> io::Result<Vec<String>> {
        let inner = &mut *self.0.0.lock().unwrap();
        inner.disk_call()?;
        let names = inner.walk.live.names.keys();
        let below = names.filter_map(|name| name.strip_prefix(path).ok()?.iter().next()?.to_str());
        let mut below: Vec<String> = below.map(str::to_owned).collect();
        below.dedup();
        Ok(below)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.0.0.lock().unwrap().record_on_disk(Event::SyncDir { dir: path.to_owned() })
    }

    fn boot_id(&self) -> io::Result<[u8; 16]> {
        let inner = &mut *self.0.0.lock().unwrap();
        inner.disk_call()?;
        Ok([inner.boot; 16])
    }
}

impl SimFile {
    fn write(&self, inner: &mut Inner, offset: u64, bytes: &[u8]) {
        inner.take_space(self.node, offset, bytes.len() as u64);
        inner.record(Event::Write { node: self.node, offset, bytes: Bytes::copy_from_slice(bytes) });
    }
}

impl DiskFile for SimFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let inner = &mut *self.sim.0.lock().unwrap();
        inner.disk_call()?;
        let (file, at) = (&inner.walk.live.files[self.node], usize::try_from(offset).unwrap());
        let bytes = file.get(at..at + buf.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        buf.copy_from_slice(bytes);
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let inner = &mut *self.sim.0.lock().unwrap();
        let (landed, outcome) = match inner.faults.next_disk_call() {
            None => (buf.len(), Ok(())),
            Some(DiskFault::Eio) => (0, Err(eio())),
            Some(DiskFault::Short) => (half(buf.len()), Err(eio())),
            Some(DiskFault::Full) => match inner.allocated_from(self.node, offset, buf.len()) {
                all if all == buf.len() => (all, Ok(())),
                some => (some, Err(full())),
            },
        };
        if landed > 0 {
            self.write(inner, offset, &buf[..landed]);
        }
        outcome
    }

    fn len(&self) -> io::Result<u64> {
        let inner = &mut *self.sim.0.lock().unwrap();
        inner.disk_call()?;
        Ok(inner.walk.live.files[self.node].len() as u64)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.sim.0.lock().unwrap().record_on_disk(Event::SetLen { node: self.node, len })
    }

    fn punch(&self, range: ByteRange) -> io::Result<()> {
        let inner = &mut *self.sim.0.lock().unwrap();
        inner.record_on_disk(Event::Punch { node: self.node, range })?;
        let whole = range.offset().div_ceil(SECTOR as u64)..range.end() / SECTOR as u64;
        inner.allocated[self.node].retain(|sector| !whole.contains(sector));
        Ok(())
    }

    fn allocate(&self, range: ByteRange) -> io::Result<()> {
        let inner = &mut *self.sim.0.lock().unwrap();
        match inner.faults.next_disk_call() {
            Some(DiskFault::Eio | DiskFault::Short) => return Err(eio()),
            Some(DiskFault::Full) => {
                let len = usize::try_from(range.len()).unwrap();
                if inner.allocated_from(self.node, range.offset(), len) < len {
                    return Err(full());
                }
            }
            None => {}
        }
        inner.take_space(self.node, range.offset(), range.len());
        inner.record(Event::Allocate { node: self.node, range });
        Ok(())
    }

    fn has_data(&self) -> io::Result<bool> {
        let inner = &mut *self.sim.0.lock().unwrap();
        inner.disk_call()?;
        // After a crash holes have their space, too: nothing says which zeros were written.
        Ok(inner.walk.live.files[self.node].iter().any(|byte| *byte != 0))
    }

    fn is_at(&self, path: &Path) -> io::Result<bool> {
        let inner = &mut *self.sim.0.lock().unwrap();
        inner.disk_call()?;
        Ok(inner.walk.live.names.get(path) == Some(&self.node))
    }

    fn sync(&self) -> io::Result<()> {
        let inner = &mut *self.sim.0.lock().unwrap();
        match inner.disk_call() {
            Ok(()) => inner.record(Event::Sync { node: self.node }),
            Err(e) => {
                inner.record(Event::SyncFailed { node: self.node });
                return Err(e);
            }
        }
        Ok(())
    }
}
