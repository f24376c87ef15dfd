//! One contract, every backend: memory, a local directory, and S3 over HTTP pass the same claims.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a test suite, whose helpers are tests too"
)]
#![allow(clippy::cast_possible_truncation, reason = "lengths of a few MiB")]

mod common;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use common::moto::Moto;
use futures_util::future::join_all;
use futures_util::{StreamExt, stream};
use nbd_server::clock::SystemClock;
use nbd_server::store::keys::ExportRoot;
use nbd_server::store::local::LocalStore;
use nbd_server::store::parts::MIN_PART_BYTES;
use nbd_server::store::probe::{ProbeError, probe};
use nbd_server::store::remote::{RemoteConfig, RemoteKind, RemoteStore};
use nbd_server::store::retry::{RetryPolicy, Retrying};
use nbd_server::store::{Body, BoxError, Condition, Key, SharedStore, StoreError, Version};
use nbd_server::units::ByteRange;

/// How many writers race for one key.
const RACERS: usize = 16;
/// How often they do.
const ROUNDS: usize = 5;

/// A store under test and the folder a claim has to itself.
struct Case {
    store: SharedStore,
    prefix: String,
}

impl Case {
    fn key(&self, rest: &str) -> Key {
        format!("{}/{rest}", self.prefix).parse().unwrap()
    }

    async fn put(&self, rest: &str, bytes: impl Into<Bytes>) -> Version {
        self.store.put(&self.key(rest), bytes.into(), Condition::Always).await.unwrap()
    }

    async fn get(&self, rest: &str) -> Bytes {
        self.store.get(&self.key(rest), 1 << 20).await.unwrap().bytes
    }
}

async fn probed(store: &SharedStore, root: &ExportRoot) -> Result<(), ProbeError> {
    probe(&Retrying::new(store.clone(), RetryPolicy::default(), Arc::new(SystemClock)), root).await
}

macro_rules! claims {
    ($($claim:ident),* $(,)?) => {
        /// Checks every claim, each in a folder of its own.
        async fn conformance(store: SharedStore, root: &ExportRoot) {
            $({
                let start = Instant::now();
                println!("{}", stringify!($claim));
                $claim(Case { store: store.clone(), prefix: format!("{}/{}", root.prefix(), stringify!($claim)) }).await;
                println!("    {:?}", start.elapsed());
            })*
            probed(&store, root).await.unwrap();
        }
    };
}

claims!(
    what_was_put_is_read_back_with_its_version,
    a_missing_object_is_not_found,
    an_object_over_the_cap_is_too_large,
    an_object_is_created_only_if_absent,
    an_object_is_swapped_only_by_its_current_version,
    of_many_creators_exactly_one_wins,
    of_many_swappers_exactly_one_wins,
    a_range_is_read_exactly,
    a_range_beyond_the_end_is_refused,
    a_delete_may_be_repeated,
    a_deleted_object_can_be_created_again,
    a_listing_goes_on_past_a_thousand_keys,
    a_prefix_is_a_folder_and_not_the_beginning_of_a_name,
    folders_are_listed_by_name,
    keys_of_unusual_characters_come_back_as_they_were,
    an_upload_of_any_length_reads_back_the_same,
    an_upload_replaces_what_was_there,
    an_upload_whose_body_fails_leaves_no_object,
    an_upload_beyond_its_bound_leaves_no_object,
);

async fn what_was_put_is_read_back_with_its_version(case: Case) {
    for content in ["", "x", "some more"] {
        let written = case.put("object", content).await;
        let read = case.store.get(&case.key("object"), 100).await.unwrap();
        assert_eq!((&read.bytes[..], &read.version), (content.as_bytes(), &written));
    }
    let first = case.put("object", "a").await;
    assert_ne!(case.put("object", "b").await, first);
}

async fn a_missing_object_is_not_found(case: Case) {
    let key = case.key("nothing");
    let range = ByteRange::new(0, 1).unwrap();
    assert!(matches!(case.store.get(&key, 9).await, Err(StoreError::NotFound { .. })));
    assert!(matches!(case.store.get_range(&key, range).await, Err(StoreError::NotFound { .. })));
    assert!(matches!(case.store.len(&key).await, Err(StoreError::NotFound { .. })));
    assert_eq!(case.store.list(&key).await.unwrap(), []);
    assert_eq!(case.store.list_folders(&key).await.unwrap(), [""; 0]);
}

async fn an_object_over_the_cap_is_too_large(case: Case) {
    case.put("object", "12345").await;
    let key = case.key("object");
    assert_eq!(&case.store.get(&key, 5).await.unwrap().bytes[..], b"12345");
    let error = case.store.get(&key, 4).await.unwrap_err();
    assert!(matches!(error, StoreError::TooLarge { max_bytes: 4, .. }), "{error}");
}

async fn an_object_is_created_only_if_absent(case: Case) {
    let key = case.key("object");
    let created = case.store.put(&key, "first".into(), Condition::IfAbsent).await.unwrap();
    for again in ["first", "second"] {
        let error = case.store.put(&key, again.into(), Condition::IfAbsent).await.unwrap_err();
        assert!(matches!(error, StoreError::Conflict { .. }), "{error}");
    }
    let read = case.store.get(&key, 9).await.unwrap();
    assert_eq!((&read.bytes[..], read.version), (&b"first"[..], created));
}

async fn an_object_is_swapped_only_by_its_current_version(case: Case) {
    let key = case.key("object");
    let put = |bytes: &'static str, condition| case.store.put(&key, bytes.into(), condition);
    let first = put("first", Condition::IfAbsent).await.unwrap();
    let second = put("second", Condition::IfVersion(first.clone())).await.unwrap();
    let stale = put("third", Condition::IfVersion(first)).await.unwrap_err();
    assert!(matches!(stale, StoreError::Conflict { .. }), "{stale}");
    assert_eq!(&case.get("object").await[..], b"second");
    case.store.delete(&key).await.unwrap();
    let gone = put("fourth", Condition::IfVersion(second)).await.unwrap_err();
    assert!(matches!(gone, StoreError::Conflict { .. }), "{gone}");
    let absent = case.store.get(&key, 9).await.unwrap_err();
    assert!(matches!(absent, StoreError::NotFound { .. }), "{absent}");
}

/// Lets writers with different contents loose on one key, round-robin over the stores given.
async fn race(stores: &[SharedStore], key: &Key, condition: &Condition) {
    let racers = (0..RACERS).map(|racer| {
        let (store, key, condition) = (stores[racer % stores.len()].clone(), key.clone(), condition.clone());
        tokio::spawn(async move {
            let content = format!("racer {racer} on {condition:?}");
            (store.put(&key, content.clone().into(), condition).await, content)
        })
    });
    let mut winners = Vec::new();
    for outcome in join_all(racers).await {
        match outcome.unwrap() {
            (Ok(version), content) => winners.push((version, content)),
            (Err(StoreError::Conflict { .. }), _) => {}
            (Err(e), _) => panic!("{e}"),
        }
    }
    assert_eq!(winners.len(), 1, "{winners:?}");
    let (version, content) = winners.remove(0);
    let standing = stores[0].get(key, 1 << 10).await.unwrap();
    assert_eq!((standing.bytes, standing.version), (content.into(), version));
}

async fn of_many_creators_exactly_one_wins(case: Case) {
    for round in 0..ROUNDS {
        race(std::slice::from_ref(&case.store), &case.key(&format!("object-{round}")), &Condition::IfAbsent).await;
    }
}

async fn of_many_swappers_exactly_one_wins(case: Case) {
    let key = case.key("object");
    case.put("object", "start").await;
    for _ in 0..ROUNDS {
        let version = case.store.get(&key, 1 << 10).await.unwrap().version;
        race(std::slice::from_ref(&case.store), &key, &Condition::IfVersion(version)).await;
    }
}

async fn a_range_is_read_exactly(case: Case) {
    let content = pattern(10_000);
    case.put("object", content.clone()).await;
    assert_eq!(case.store.len(&case.key("object")).await.unwrap(), 10_000);
    for (offset, len) in [(0, 1), (0, 10_000), (1, 9_999), (4_096, 4_096), (9_999, 1)] {
        let range = ByteRange::new(offset, len).unwrap();
        let read = case.store.get_range(&case.key("object"), range).await.unwrap();
        assert_eq!(read, content[offset as usize..][..len as usize], "{range}");
    }
}

async fn a_range_beyond_the_end_is_refused(case: Case) {
    case.put("object", pattern(100)).await;
    case.put("empty", "").await;
    for (name, offset, len) in
        [("object", 0, 101), ("object", 99, 2), ("object", 100, 1), ("object", 1 << 40, 5), ("empty", 0, 1)]
    {
        let range = ByteRange::new(offset, len).unwrap();
        let error = case.store.get_range(&case.key(name), range).await.unwrap_err();
        assert!(matches!(error, StoreError::Short { .. }), "{name} {range}: {error}");
    }
}

async fn a_delete_may_be_repeated(case: Case) {
    case.put("object", "x").await;
    case.put("beside", "y").await;
    for _ in 0..3 {
        case.store.delete(&case.key("object")).await.unwrap();
    }
    assert!(matches!(case.store.get(&case.key("object"), 9).await, Err(StoreError::NotFound { .. })));
    assert_eq!(&case.get("beside").await[..], b"y");
}

async fn a_deleted_object_can_be_created_again(case: Case) {
    let key = case.key("folder/object");
    for _ in 0..3 {
        case.store.put(&key, "x".into(), Condition::IfAbsent).await.unwrap();
        case.store.delete(&key).await.unwrap();
    }
    assert_eq!(case.store.list(&case.prefix.parse().unwrap()).await.unwrap(), []);
}

async fn a_listing_goes_on_past_a_thousand_keys(case: Case) {
    const COUNT: usize = 1_105;
    let mut expected: Vec<Key> = (0..COUNT).map(|i| case.key(&format!("many/{i:04}/object"))).collect();
    let puts = expected.iter().map(|key| case.store.put(key, "x".into(), Condition::Always));
    let outcomes: Vec<_> = stream::iter(puts).buffer_unordered(16).collect().await;
    outcomes.into_iter().for_each(|outcome| drop(outcome.unwrap()));
    expected.sort();
    assert_eq!(case.store.list(&case.key("many")).await.unwrap(), expected);
    let folders: Vec<String> = (0..COUNT).map(|i| format!("{i:04}")).collect();
    assert_eq!(case.store.list_folders(&case.key("many")).await.unwrap(), folders);
}

async fn a_prefix_is_a_folder_and_not_the_beginning_of_a_name(case: Case) {
    for name in ["vm-1/volume.json", "vm-10/volume.json", "vm-1.json", "vm-1-copy/a/b"] {
        case.put(name, "x").await;
    }
    assert_eq!(case.store.list(&case.key("vm-1")).await.unwrap(), [case.key("vm-1/volume.json")]);
    assert_eq!(case.store.list_folders(&case.key("vm-1-copy")).await.unwrap(), ["a"]);
    assert_eq!(case.store.list_folders(&case.key("vm-1")).await.unwrap(), [""; 0]);
    // An object is not below itself.
    assert_eq!(case.store.list(&case.key("vm-1.json")).await.unwrap(), []);
}

async fn folders_are_listed_by_name(case: Case) {
    for name in ["b/volume.json", "a/snapshots/1/manifest.json", "a/volume.json", "c/d/e", "loose"] {
        case.put(name, "x").await;
    }
    assert_eq!(case.store.list_folders(&case.prefix.parse().unwrap()).await.unwrap(), ["a", "b", "c"]);
    let sorted: Vec<Key> = ["a/snapshots/1/manifest.json", "a/volume.json", "b/volume.json", "c/d/e", "loose"]
        .map(|name| case.key(name))
        .into();
    assert_eq!(case.store.list(&case.prefix.parse().unwrap()).await.unwrap(), sorted);
}

async fn keys_of_unusual_characters_come_back_as_they_were(case: Case) {
    let names =
        ["a b", "100%", "%41", "a+b", "q?x=1&y", "#hash", "tilde~", "quote\"'", "...", ".hidden", "<&>", "a\\b"];
    let mut expected = Vec::new();
    for name in names {
        case.put(&format!("folder {name}/{name}"), name).await;
        assert_eq!(case.get(&format!("folder {name}/{name}")).await, name);
        expected.push(case.key(&format!("folder {name}/{name}")));
    }
    expected.sort();
    assert_eq!(case.store.list(&case.prefix.parse().unwrap()).await.unwrap(), expected);
    let folders: BTreeSet<String> = names.iter().map(|name| format!("folder {name}")).collect();
    let listed = case.store.list_folders(&case.prefix.parse().unwrap()).await.unwrap();
    assert_eq!(listed, folders.into_iter().collect::<Vec<_>>());
}

/// Bytes that show where they come from.
fn pattern(len: usize) -> Bytes {
    (0..len).map(|i| (i ^ (i >> 8) ^ (i >> 16)) as u8).collect()
}

/// The bytes as a body, in pieces of the lengths given, over and over.
fn in_pieces(content: &Bytes, lengths: &[usize]) -> Body<'static> {
    let mut rest = content.clone();
    let lengths = lengths.to_vec();
    let mut turn = 0;
    stream::iter(std::iter::from_fn(move || {
        (!rest.is_empty()).then(|| {
            let piece = rest.split_to(lengths[turn % lengths.len()].min(rest.len()));
            turn += 1;
            Ok(piece)
        })
    }))
    .boxed()
}

async fn assert_uploaded(case: &Case, name: &str, content: &Bytes) {
    let read = case.store.get(&case.key(name), 1 << 30).await.unwrap().bytes;
    assert_eq!(read.len(), content.len(), "{name}");
    assert!(read == *content, "{name} differs at {:?}", read.iter().zip(content).position(|(a, b)| a != b));
}

async fn an_upload_of_any_length_reads_back_the_same(case: Case) {
    let part = MIN_PART_BYTES as usize;
    let max_bytes = 1 << 30;
    for (name, len, pieces) in [
        ("empty", 0, &[1][..]),
        ("one byte", 1, &[1]),
        ("below a part", part - 1, &[4096]),
        ("a part", part, &[1 << 20]),
        ("a part in one piece", part, &[part]),
        ("a byte more than a part", part + 1, &[part]),
        ("two parts", 2 * part, &[4 << 20]),
        ("odd pieces", 2 * part + 12_345, &[1, 70_001, 0, 3 << 20, 17, 65_536]),
        ("one piece for all", 3 * part + 7, &[4 * part]),
    ] {
        let content = pattern(len);
        // A length of zero among the pieces is an empty piece, which is allowed; but not only those.
        case.store.upload(&case.key(name), max_bytes, in_pieces(&content, pieces)).await.unwrap();
        assert_uploaded(&case, name, &content).await;
    }
    assert_eq!(case.store.list(&case.prefix.parse().unwrap()).await.unwrap().len(), 9);
}

async fn an_upload_replaces_what_was_there(case: Case) {
    case.put("blob", "older and short").await;
    let content = pattern(MIN_PART_BYTES as usize + 99);
    case.store.upload(&case.key("blob"), 1 << 30, in_pieces(&content, &[1 << 20])).await.unwrap();
    assert_uploaded(&case, "blob", &content).await;
}

async fn an_upload_whose_body_fails_leaves_no_object(case: Case) {
    for good_bytes in [0, 1_000, MIN_PART_BYTES as usize + 1_000, 3 * MIN_PART_BYTES as usize] {
        let broken: BoxError = "the disk is on fire".into();
        let body = in_pieces(&pattern(good_bytes), &[1 << 20]).chain(stream::iter([Err(broken)])).boxed();
        let error = case.store.upload(&case.key("blob"), 1 << 30, body).await.unwrap_err();
        assert!(matches!(error, StoreError::Body { .. }), "{error}");
        assert!(error.to_string().contains("the disk is on fire"), "{error}");
    }
    assert_eq!(case.store.list(&case.prefix.parse().unwrap()).await.unwrap(), []);
}

async fn an_upload_beyond_its_bound_leaves_no_object(case: Case) {
    for max_bytes in [10, 2 * MIN_PART_BYTES] {
        let content = pattern(max_bytes as usize + 1);
        let error = case.store.upload(&case.key("blob"), max_bytes, in_pieces(&content, &[1 << 20])).await.unwrap_err();
        assert!(matches!(error, StoreError::TooLarge { .. }), "{error}");
        let exact = content.slice(..max_bytes as usize);
        case.store.upload(&case.key("exact"), max_bytes, in_pieces(&exact, &[1 << 20])).await.unwrap();
        assert_uploaded(&case, "exact", &exact).await;
    }
    assert_eq!(case.store.list(&case.prefix.parse().unwrap()).await.unwrap(), [case.key("exact")]);
}

fn root() -> ExportRoot {
    ExportRoot::new("team-a/exports".parse().unwrap())
}

fn local(root: &tempfile::TempDir) -> SharedStore {
    Arc::new(LocalStore::open(root.path().to_owned(), Arc::new(SystemClock)).unwrap())
}

fn s3(moto: &Moto, bucket: &str) -> SharedStore {
    let config = RemoteConfig {
        kind: RemoteKind::S3,
        bucket: Some(bucket.into()),
        endpoint_url: Some(moto.endpoint()),
        region: None,
        r2_account_id: None,
    };
    let keys = |name: &str| matches!(name, "AWS_ACCESS_KEY_ID" | "AWS_SECRET_ACCESS_KEY").then(|| "test".to_owned());
    let policy = RetryPolicy { limit: Duration::from_secs(20), ..RetryPolicy::default() };
    Arc::new(RemoteStore::connect(&config, &keys, policy, Arc::new(SystemClock)).unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_conforms() {
    conformance(Arc::new(RemoteStore::memory()), &root()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_local_directory_conforms() {
    let folder = tempfile::tempdir().unwrap();
    conformance(local(&folder), &root()).await;
    assert_eq!(std::fs::read_dir(folder.path().join(".tmp")).unwrap().count(), 0, "tmp files left behind");
}

#[tokio::test(flavor = "multi_thread")]
async fn s3_over_http_conforms() {
    let moto = Moto::with_bucket("disks");
    conformance(s3(&moto, "disks"), &root()).await;
    let uploads = moto.request("GET /disks?uploads HTTP/1.1").unwrap();
    assert!(uploads.contains("ListMultipartUploadsResult"), "{uploads}");
    assert!(!uploads.contains("<UploadId>"), "incomplete uploads left behind: {uploads}");
}

#[tokio::test(flavor = "multi_thread")]
async fn names_that_no_key_can_have_are_left_out_of_listings_and_hide_nothing() {
    let moto = Moto::with_bucket("disks");
    let store = s3(&moto, "disks");
    let names =
        ["exports/-/x", "exports/0", "exports/0/x", "exports/a", "exports/vm-1/x", "exports/vm-2/x", "exports/z/x"];
    let keys: Vec<Key> = names.iter().map(|name| name.parse().unwrap()).collect();
    for key in &keys {
        store.put(key, "x".into(), Condition::Always).await.unwrap();
    }
    for stray in ["exports//stray", "exports//z/x", "exports/vm-1//x", "exports/../x", "exports/z//"] {
        let answer = moto.request(&format!("PUT /disks/{stray} HTTP/1.1")).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    }
    let prefix: Key = "exports".parse().unwrap();
    assert_eq!(store.list_folders(&prefix).await.unwrap(), ["-", "0", "vm-1", "vm-2", "z"]);
    assert_eq!(store.list(&prefix).await.unwrap(), keys);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_behind_retries_conforms() {
    let inner: SharedStore = Arc::new(RemoteStore::memory());
    conformance(Arc::new(Retrying::new(inner, RetryPolicy::default(), Arc::new(SystemClock))), &root()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bucket_that_does_not_exist_is_refused_by_name() {
    let moto = Moto::start();
    let store = s3(&moto, "nowhere");
    let key: Key = "exports/vm/volume.json".parse().unwrap();
    let outcomes = [
        store.get(&key, 9).await.map(drop),
        store.put(&key, "x".into(), Condition::IfAbsent).await.map(drop),
        store.put(&key, "x".into(), Condition::IfVersion(Version("\"x\"".into()))).await.map(drop),
        store.list(&"exports".parse().unwrap()).await.map(drop),
    ];
    for outcome in outcomes {
        let error = outcome.unwrap_err();
        assert!(matches!(error, StoreError::Refused { .. }), "{error}");
        assert!(error.to_string().contains("NoSuchBucket"), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_that_is_abandoned_is_discarded_by_the_store() {
    let moto = Moto::with_bucket("disks");
    let store = s3(&moto, "disks");
    let uploads = || moto.request("GET /disks?uploads HTTP/1.1").unwrap();
    let stuck = in_pieces(&pattern(2 * MIN_PART_BYTES as usize), &[1 << 20]).chain(stream::pending()).boxed();
    let key = "exports/vm/delta.blob".parse().unwrap();
    let mut upload = store.upload(&key, 1 << 30, stuck);
    let begun = async {
        // Once a part is there, the client knows the upload that it belongs to.
        let stored = |id: &str| {
            let parts = moto.request(&format!("GET /disks/exports/vm/delta.blob?uploadId={id} HTTP/1.1")).unwrap();
            parts.contains("<PartNumber>")
        };
        let id = |list: &str| Some(list.split_once("<UploadId>")?.1.split_once('<')?.0.to_owned());
        while !id(&uploads()).is_some_and(|id| stored(&id)) {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::select! {
        outcome = &mut upload => panic!("{outcome:?}"),
        () = begun => {}
        () = tokio::time::sleep(Duration::from_secs(30)) => panic!("the upload never began"),
    }
    drop(upload);
    let deadline = Instant::now() + Duration::from_secs(30);
    while uploads().contains("<UploadId>") {
        assert!(Instant::now() < deadline, "{}", uploads());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn servers_that_share_a_local_directory_race_as_one_store() {
    let folder = tempfile::tempdir().unwrap();
    // Each takes the lock through a file of its own, as another process does.
    let servers: Vec<SharedStore> = (0..4).map(|_| local(&folder)).collect();
    let key: Key = "exports/vm/volume.json".parse().unwrap();
    for round in 0..20 {
        let created = format!("exports/vm-{round}/volume.json").parse().unwrap();
        race(&servers, &created, &Condition::IfAbsent).await;
        servers[0].put(&key, "start".into(), Condition::Always).await.unwrap();
        let version = servers[1].get(&key, 1 << 10).await.unwrap().version;
        race(&servers, &key, &Condition::IfVersion(version)).await;
    }
    let outcomes = join_all(servers.iter().map(|server| async { probed(server, &root()).await })).await;
    outcomes.into_iter().for_each(|outcome| outcome.unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn writers_and_deleters_of_one_folder_do_not_trip_over_each_other() {
    let folder = tempfile::tempdir().unwrap();
    let servers: Vec<SharedStore> = (0..4).map(|_| local(&folder)).collect();
    let tasks = (0..RACERS).map(|i| {
        let server = servers[i % servers.len()].clone();
        // Two to a folder, so that it is empty again and again.
        let key: Key = format!("exports/vm/deep-{}/down/object-{i}", i / 2).parse().unwrap();
        tokio::spawn(async move {
            for _ in 0..25 {
                server.put(&key, "x".into(), Condition::IfAbsent).await.unwrap();
                server.list(&"exports".parse().unwrap()).await.unwrap();
                server.delete(&key).await.unwrap();
            }
        })
    });
    join_all(tasks).await.into_iter().for_each(|task| task.unwrap());
    assert_eq!(servers[0].list_folders(&"exports".parse().unwrap()).await.unwrap(), [""; 0]);
}
