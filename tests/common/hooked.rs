//! A disk that asks the test before every operation: to fail it, to delay it, or to do something else in between.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, Weak};

use nbd_server::disk::{Disk, DiskFile};
use nbd_server::units::ByteRange;

type Hook = Arc<dyn Fn(&str, &Path) -> io::Result<()> + Send + Sync>;

/// Wraps a disk. Operations are named as the traits' methods.
#[derive(Clone)]
pub struct Hooked {
    inner: Arc<dyn Disk>,
    hook: Arc<Mutex<Hook>>,
    /// The names that open files have now.
    names: Arc<Mutex<Vec<Weak<Mutex<PathBuf>>>>>,
    boot: Option<u8>,
}

impl std::fmt::Debug for Hooked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Hooked")
    }
}

impl Hooked {
    pub fn new(inner: impl Disk + 'static) -> Self {
        let hook: Hook = Arc::new(|_, _| Ok(()));
        Self { inner: Arc::new(inner), hook: Arc::new(Mutex::new(hook)), names: Arc::default(), boot: None }
    }

    /// The same disk after the host went down and came up again, with everything that was written still there.
    pub fn after_boot(self, boot: u8) -> Self {
        Self { boot: Some(boot), ..self }
    }

    /// Is asked before every operation from now on. It runs on the thread of the operation and may use the disk.
    pub fn hook(&self, hook: impl Fn(&str, &Path) -> io::Result<()> + Send + Sync + 'static) {
        *self.hook.lock().unwrap() = Arc::new(hook);
    }

    /// Every operation on a path that ends like this fails with the error.
    pub fn fail(&self, operation: &'static str, name: &'static str, kind: io::ErrorKind) {
        self.hook(move |op, path| if op == operation && path.ends_with(name) { Err(kind.into()) } else { Ok(()) });
    }

    pub fn serve_all(&self) {
        self.hook(|_, _| Ok(()));
    }

    fn ask(&self, operation: &str, path: &Path) -> io::Result<()> {
        let hook = Arc::clone(&self.hook.lock().unwrap());
        hook(operation, path)
    }

    fn wrap(&self, path: &Path, file: Arc<dyn DiskFile>) -> Arc<dyn DiskFile> {
        let path = Arc::new(Mutex::new(path.to_owned()));
        self.names.lock().unwrap().push(Arc::downgrade(&path));
        Arc::new(HookedFile { disk: self.clone(), path, file })
    }

    /// Open files get the names that they have after a rename or an exchange.
    fn rename_open(&self, rename: impl Fn(&Path) -> Option<PathBuf>) {
        for name in self.names.lock().unwrap().iter().filter_map(Weak::upgrade) {
            let mut name = name.lock().unwrap();
            if let Some(new) = rename(&name) {
                *name = new;
            }
        }
    }
}

impl Disk for Hooked {
    fn open(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        self.ask("open", path)?;
        Ok(self.wrap(path, self.inner.open(path)?))
    }
    fn create(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        self.ask("create", path)?;
        Ok(self.wrap(path, self.inner.create(path)?))
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.ask("rename", to)?;
        self.inner.rename(from, to)?;
        self.rename_open(|name| (name == from).then(|| to.to_owned()));
        Ok(())
    }
    fn exchange(&self, a: &Path, b: &Path) -> io::Result<()> {
        self.ask("exchange", b)?;
        self.inner.exchange(a, b)?;
        self.rename_open(|name| match name {
            name if name == a => Some(b.to_owned()),
            name if name == b => Some(a.to_owned()),
            _ => None,
        });
        Ok(())
    }
    fn remove(&self, path: &Path) -> io::Result<()> {
        self.ask("remove", path)?;
        self.inner.remove(path)
    }
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        self.ask("create_dir", path)?;
        self.inner.create_dir(path)
    }
    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        self.ask("remove_dir", path)?;
        self.inner.remove_dir(path)
    }
    fn list_dir(&self, path: &Path) -> io::Result<Vec<String>> {
        self.ask("list_dir", path)?;
        self.inner.list_dir(path)
    }
    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.ask("sync_dir", path)?;
        self.inner.sync_dir(path)
    }
    fn boot_id(&self) -> io::Result<[u8; 16]> {
        self.boot.map_or_else(|| self.inner.boot_id(), |boot| Ok([boot; 16]))
    }
}

/// Operations on an open file go by the name it has.
#[derive(Debug)]
struct HookedFile {
    disk: Hooked,
    path: Arc<Mutex<PathBuf>>,
    file: Arc<dyn DiskFile>,
}

impl HookedFile {
    fn ask(&self, operation: &str) -> io::Result<()> {
        let path = self.path.lock().unwrap().clone();
        self.disk.ask(operation, &path)
    }
}

impl DiskFile for HookedFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.ask("read_at")?;
        self.file.read_at(buf, offset)
    }
    /// A hook that refuses stands for a disk that would have to be waited for.
    fn read_at_once(&self, buf: &mut [u8], offset: u64) -> io::Result<bool> {
        match self.ask("read_at_once") {
            Ok(()) => self.file.read_at_once(buf, offset),
            Err(_) => Ok(false),
        }
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.ask("write_at")?;
        self.file.write_at(buf, offset)
    }
    fn len(&self) -> io::Result<u64> {
        self.ask("len")?;
        self.file.len()
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.ask("set_len")?;
        self.file.set_len(len)
    }
    fn punch(&self, range: ByteRange) -> io::Result<()> {
        self.ask("punch")?;
        self.file.punch(range)
    }
    fn allocate(&self, range: ByteRange) -> io::Result<()> {
        self.ask("allocate")?;
        self.file.allocate(range)
    }
    fn sync(&self) -> io::Result<()> {
        self.ask("sync")?;
        self.file.sync()
    }
    fn has_data(&self) -> io::Result<bool> {
        self.ask("has_data")?;
        self.file.has_data()
    }
    fn is_at(&self, path: &Path) -> io::Result<bool> {
        self.ask("is_at")?;
        self.file.is_at(path)
    }
}
