use std::time::{Duration, SystemTime};

use futures_util::StreamExt;

use super::*;
use crate::clock::SystemClock;

/// A clock that shows one time until told otherwise, and never waits.
#[derive(Debug)]
struct StoppedClock(std::sync::Mutex<SystemTime>);

impl StoppedClock {
    fn at(seconds: u64) -> Arc<Self> {
        Arc::new(Self(std::sync::Mutex::new(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds))))
    }

    fn set(&self, seconds: u64) {
        *self.0.lock().unwrap() = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
    }
}

#[async_trait::async_trait]
impl Clock for StoppedClock {
    fn now(&self) -> SystemTime {
        *self.0.lock().unwrap()
    }

    fn monotonic(&self) -> Duration {
        Duration::ZERO
    }

    async fn sleep(&self, _: Duration) {}
}

fn store() -> (tempfile::TempDir, LocalStore) {
    let root = tempfile::tempdir().unwrap();
    let store = LocalStore::open(root.path().to_owned(), Arc::new(SystemClock)).unwrap();
    (root, store)
}

fn key(text: &str) -> Key {
    text.parse().unwrap()
}

fn tmp_files(root: &std::path::Path) -> usize {
    std::fs::read_dir(root.join(".tmp")).unwrap().count()
}

#[tokio::test]
async fn rewriting_the_same_bytes_moves_the_version_even_when_the_clock_stands_still() {
    let root = tempfile::tempdir().unwrap();
    let clock = StoppedClock::at(1_700_000_000);
    let store = LocalStore::open(root.path().to_owned(), clock.clone()).unwrap();
    let head = key("exports/vm/volume.json");
    let mut versions = vec![store.put(&head, "same".into(), Condition::IfAbsent).await.unwrap()];
    for _ in 0..50 {
        let last = versions.last().unwrap().clone();
        versions.push(store.put(&head, "same".into(), Condition::IfVersion(last)).await.unwrap());
    }
    clock.set(1_600_000_000);
    versions.push(store.put(&head, "same".into(), Condition::Always).await.unwrap());
    let times: Vec<_> = versions.iter().map(|v| v.0.split('-').next().unwrap().to_owned()).collect();
    assert!(times.is_sorted_by(|a, b| a < b), "{times:?}");
}

#[tokio::test]
async fn an_object_is_a_plain_file_at_its_key() {
    let (root, store) = store();
    store.put(&key("exports/vm/volume.json"), "head".into(), Condition::IfAbsent).await.unwrap();
    assert_eq!(std::fs::read(root.path().join("exports/vm/volume.json")).unwrap(), b"head");
    assert_eq!(tmp_files(root.path()), 0);
}

#[tokio::test]
async fn the_stores_own_names_are_neither_listed_nor_served() {
    let (_root, store) = store();
    for own in [".lock", ".tmp", ".tmp/x", ".anything/else"] {
        let own = key(own);
        assert!(matches!(store.get(&own, 9).await, Err(StoreError::Refused { .. })), "{own}");
        assert!(matches!(store.put(&own, "x".into(), Condition::Always).await, Err(StoreError::Refused { .. })));
        assert!(matches!(store.delete(&own).await, Err(StoreError::Refused { .. })));
        assert!(matches!(store.list(&own).await, Err(StoreError::Refused { .. })));
    }
}

#[tokio::test]
async fn a_folder_or_a_link_where_an_object_should_be_is_refused_by_name() {
    let (root, store) = store();
    std::fs::create_dir_all(root.path().join("exports/folder")).unwrap();
    std::fs::write(root.path().join("secret"), "elsewhere").unwrap();
    std::os::unix::fs::symlink("../secret", root.path().join("exports/link")).unwrap();
    for name in ["exports/folder", "exports/link"] {
        let at = key(name);
        let range = ByteRange::new(0, 1).unwrap();
        let errors = [
            store.get(&at, 99).await.map(drop).unwrap_err(),
            store.get_range(&at, range).await.map(drop).unwrap_err(),
            store.put(&at, "x".into(), Condition::Always).await.map(drop).unwrap_err(),
            store.put(&at, "x".into(), Condition::IfAbsent).await.map(drop).unwrap_err(),
            store.delete(&at).await.unwrap_err(),
        ];
        for error in errors {
            assert!(matches!(error, StoreError::Refused { .. }), "{error}");
            assert!(error.to_string().contains(name), "{error}");
        }
    }
    assert_eq!(store.list(&key("exports")).await.unwrap(), []);
    assert_eq!(std::fs::read(root.path().join("secret")).unwrap(), b"elsewhere");
    assert_eq!(tmp_files(root.path()), 0);
}

#[tokio::test]
async fn an_object_where_a_folder_would_be_hides_nothing_and_is_not_replaced() {
    let (_root, store) = store();
    store.put(&key("exports/vm"), "file".into(), Condition::Always).await.unwrap();
    let below = key("exports/vm/volume.json");
    assert!(matches!(store.get(&below, 9).await, Err(StoreError::NotFound { .. })));
    assert!(matches!(store.put(&below, "x".into(), Condition::IfAbsent).await, Err(StoreError::Refused { .. })));
    store.delete(&below).await.unwrap();
    assert_eq!(&store.get(&key("exports/vm"), 9).await.unwrap().bytes[..], b"file");
}

#[tokio::test]
async fn deleting_the_last_object_of_a_folder_removes_the_folder() {
    let (_root, store) = store();
    for name in ["exports/a/volume.json", "exports/b/refs/current.json"] {
        store.put(&key(name), "x".into(), Condition::Always).await.unwrap();
    }
    store.delete(&key("exports/b/refs/current.json")).await.unwrap();
    assert_eq!(store.list_folders(&key("exports")).await.unwrap(), ["a"]);
    assert_eq!(store.list(&key("exports")).await.unwrap(), [key("exports/a/volume.json")]);
}

#[test]
fn an_open_removes_what_dead_writers_left_and_nothing_that_somebody_holds() {
    let (root, _store) = store();
    let old = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
    let leave = |name: &str, modified: Option<SystemTime>| {
        let file = std::fs::File::create(root.path().join(".tmp").join(name)).unwrap();
        if let Some(modified) = modified {
            file.set_modified(modified).unwrap();
        }
        file
    };
    drop(leave("dead and old", Some(old)));
    drop(leave("dead since a moment", None));
    let writers = [leave("slow", Some(old)), leave("young", None)];
    writers.iter().for_each(|writer| writer.lock().unwrap());
    LocalStore::open(root.path().to_owned(), Arc::new(SystemClock)).unwrap();
    let left = std::fs::read_dir(root.path().join(".tmp")).unwrap().map(|e| e.unwrap().file_name());
    let mut left: Vec<_> = left.collect();
    left.sort();
    assert_eq!(left, ["slow", "young"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn servers_that_start_take_nothing_from_writers_that_begin() {
    let (root, store) = store();
    let done = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let starting: Vec<_> = (0..2)
        .map(|_| {
            let (root, done) = (root.path().to_owned(), Arc::clone(&done));
            tokio::task::spawn_blocking(move || {
                while !done.load(std::sync::atomic::Ordering::SeqCst) {
                    LocalStore::open(root.clone(), Arc::new(SystemClock)).unwrap();
                }
            })
        })
        .collect();
    let written = futures_util::stream::iter(0..300)
        .map(|i| {
            let store = store.clone();
            async move { store.put(&key(&format!("exports/vm/{i}")), "x".into(), Condition::IfAbsent).await }
        })
        .buffer_unordered(4)
        .collect::<Vec<_>>()
        .await;
    done.store(true, std::sync::atomic::Ordering::SeqCst);
    futures_util::future::join_all(starting).await;
    assert!(written.iter().all(Result::is_ok), "{:?}", written.iter().find(|put| put.is_err()));
    assert_eq!(store.list(&key("exports")).await.unwrap().len(), written.len());
}

#[tokio::test]
async fn an_abandoned_upload_leaves_neither_object_nor_tmp_file() {
    let (root, store) = store();
    let stuck =
        futures_util::stream::iter([Ok(Bytes::from(vec![7; 3 << 20]))]).chain(futures_util::stream::pending()).boxed();
    let blob = key("exports/vm/snapshots/s/delta.blob");
    let upload = store.upload(&blob, 9 << 20, stuck);
    tokio::time::timeout(Duration::from_millis(200), upload).await.unwrap_err();
    assert_eq!(store.list(&key("exports")).await.unwrap(), []);
    assert_eq!(tmp_files(root.path()), 0);
}

#[test]
fn a_root_that_cannot_be_used_is_an_error_that_names_it() {
    let root = tempfile::tempdir().unwrap();
    let file = root.path().join("file");
    std::fs::write(&file, "").unwrap();
    let error = LocalStore::open(file.join("store"), Arc::new(SystemClock)).unwrap_err();
    assert!(error.to_string().contains(&*file.to_string_lossy()), "{error}");
}

#[tokio::test]
async fn ten_thousand_folders_are_listed_in_well_under_a_second() {
    let (root, store) = store();
    for i in 0..10_000 {
        std::fs::create_dir_all(root.path().join(format!("exports/vm-{i:05}"))).unwrap();
    }
    let start = std::time::Instant::now();
    let names = store.list_folders(&key("exports")).await.unwrap();
    assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
    assert_eq!((names.len(), &*names[0], &*names[9_999]), (10_000, "vm-00000", "vm-09999"));
}

fn fifo(path: &std::path::Path) {
    rustix::fs::mknodat(rustix::fs::CWD, path, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
}

/// Runs what must not hang on a thread of its own.
fn in_time<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let (done, ended) = std::sync::mpsc::channel();
    std::thread::Builder::new().spawn(move || done.send(work())).unwrap();
    ended.recv_timeout(Duration::from_secs(60)).expect("it hangs")
}

#[test]
fn special_files_in_the_stores_own_places_hang_no_open_and_are_named() {
    let open = |root: &std::path::Path| {
        let root = root.to_owned();
        in_time(move || LocalStore::open(root, Arc::new(SystemClock)).map(drop))
    };
    let (root, _store) = store();
    fifo(&root.path().join(".tmp/pipe"));
    let _socket = std::os::unix::net::UnixListener::bind(root.path().join(".tmp/socket")).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", root.path().join(".tmp/link")).unwrap();
    open(root.path()).unwrap();
    assert_eq!(tmp_files(root.path()), 3, "what is no file of a writer is left");

    let lock = root.path().join(".lock");
    std::fs::remove_file(&lock).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(&lock).unwrap();
    assert!(open(root.path()).unwrap_err().to_string().contains(".lock"));
    std::fs::remove_file(&lock).unwrap();
    fifo(&lock);
    assert!(open(root.path()).unwrap_err().to_string().contains(".lock"));
}

#[tokio::test]
async fn a_pipe_or_a_socket_in_the_place_of_an_object_or_a_folder_is_refused_by_name() {
    let (root, store) = store();
    std::fs::create_dir_all(root.path().join("exports")).unwrap();
    fifo(&root.path().join("exports/pipe"));
    let _socket = std::os::unix::net::UnixListener::bind(root.path().join("exports/socket")).unwrap();
    for name in ["exports/pipe", "exports/socket", "exports/pipe/volume.json", "exports/socket/volume.json"] {
        let at = key(name);
        let errors = [
            store.get(&at, 99).await.map(drop).unwrap_err(),
            store.put(&at, "x".into(), Condition::IfAbsent).await.map(drop).unwrap_err(),
            store.delete(&at).await.unwrap_err(),
        ];
        for error in errors {
            assert!(matches!(error, StoreError::Refused { .. }), "{error}");
            assert!(error.to_string().contains(name.trim_end_matches("/volume.json")), "{error}");
        }
    }
    assert_eq!(store.list_folders(&key("exports")).await.unwrap(), Vec::<String>::new());
}

#[tokio::test]
async fn a_folder_that_is_a_link_leads_nowhere_and_the_root_may_be_one() {
    let (root, _store) = store();
    let elsewhere = tempfile::tempdir().unwrap();
    let link = elsewhere.path().join("store");
    std::os::unix::fs::symlink(root.path(), &link).unwrap();
    let store = LocalStore::open(link, Arc::new(SystemClock)).unwrap();
    let outside = tempfile::tempdir().unwrap();
    std::fs::write(outside.path().join("volume.json"), "outside").unwrap();
    std::fs::create_dir(root.path().join("exports")).unwrap();
    std::os::unix::fs::symlink(outside.path(), root.path().join("exports/vm")).unwrap();
    let there = key("exports/vm/volume.json");
    let errors = [
        store.get(&there, 99).await.map(drop).unwrap_err(),
        store.put(&there, "x".into(), Condition::Always).await.map(drop).unwrap_err(),
        store.put(&key("exports/vm/new/object"), "x".into(), Condition::IfAbsent).await.map(drop).unwrap_err(),
        store.delete(&there).await.unwrap_err(),
        store.list(&key("exports/vm")).await.map(drop).unwrap_err(),
        store.list_folders(&key("exports/vm")).await.map(drop).unwrap_err(),
    ];
    for error in errors {
        assert!(matches!(error, StoreError::Refused { .. }), "{error}");
        assert!(error.to_string().contains("exports/vm is a link"), "{error}");
    }
    assert_eq!(std::fs::read(outside.path().join("volume.json")).unwrap(), b"outside");
    assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 1);
}

#[tokio::test]
async fn a_root_that_is_gone_is_an_outage_and_no_object_missing() {
    let (root, store) = store();
    let head = key("exports/vm/volume.json");
    store.put(&head, "head".into(), Condition::IfAbsent).await.unwrap();
    let away = root.path().with_extension("away");
    std::fs::rename(root.path(), &away).unwrap();
    let unavailable = |error: StoreError| matches!(error, StoreError::Unavailable { .. });
    assert!(unavailable(store.get(&head, 99).await.map(drop).unwrap_err()));
    assert!(unavailable(store.list(&key("exports")).await.map(drop).unwrap_err()));
    assert!(unavailable(store.put(&head, "x".into(), Condition::IfAbsent).await.map(drop).unwrap_err()));
    std::fs::rename(&away, root.path()).unwrap();
    assert_eq!(&store.get(&head, 99).await.unwrap().bytes[..], b"head");
}

#[tokio::test]
async fn what_the_store_makes_is_for_its_owner_alone_whatever_was_there_before() {
    use std::os::unix::fs::PermissionsExt;
    let root = tempfile::tempdir().unwrap();
    std::fs::set_permissions(root.path(), PermissionsExt::from_mode(0o755)).unwrap();
    let store = LocalStore::open(root.path().to_owned(), Arc::new(SystemClock)).unwrap();
    store.put(&key("exports/vm/volume.json"), "head".into(), Condition::IfAbsent).await.unwrap();
    let blob = futures_util::stream::iter([Ok(Bytes::from(vec![7; 1 << 20]))]).boxed();
    store.upload(&key("exports/vm/snapshots/s/delta.blob"), 9 << 20, blob).await.unwrap();
    let mode = |name: &str| std::fs::metadata(root.path().join(name)).unwrap().permissions().mode() & 0o777;
    for folder in [".tmp", "exports", "exports/vm", "exports/vm/snapshots"] {
        assert_eq!(mode(folder), 0o700, "{folder}");
    }
    for file in [".lock", "exports/vm/volume.json", "exports/vm/snapshots/s/delta.blob"] {
        assert_eq!(mode(file), 0o600, "{file}");
    }
    assert_eq!(mode("."), 0o755, "the root's mode is its owner's");
}
