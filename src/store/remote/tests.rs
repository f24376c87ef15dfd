//! An S3 endpoint that misbehaves to order, at the level of bytes on a socket.

use std::collections::VecDeque;
use std::sync::Mutex;

use futures_util::{StreamExt, stream};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::*;
use crate::clock::SystemClock;
use crate::store::parts::MIN_PART_BYTES;

const S3_KEYS: [(&str, &str); 2] = [("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE"), ("AWS_SECRET_ACCESS_KEY", "hushhush")];
const AZURE_KEYS: [(&str, &str); 2] =
    [("AZURE_STORAGE_ACCOUNT_NAME", "account"), ("AZURE_STORAGE_ACCOUNT_KEY", "aGVsbG8=")];

/// One answer of the endpoint.
#[derive(Debug, Clone)]
enum Answer {
    /// These bytes, then the connection is closed.
    Raw(String),
    /// These bytes, and the connection stays open.
    Stalls(String),
    /// The connection is closed before any answer.
    HangUp,
}

/// Answers each request with the next line of the script (for ever the last one), and keeps the requests.
#[derive(Debug)]
struct Endpoint {
    url: String,
    requests: Arc<Mutex<Vec<String>>>,
}

impl Endpoint {
    async fn start(script: &[Answer]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let requests = Arc::new(Mutex::new(Vec::new()));
        let mut script: VecDeque<Answer> = script.iter().cloned().collect();
        let seen = requests.clone();
        let mut stalled = Vec::new();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let Some(request) = read_request(&mut stream).await else { continue };
                seen.lock().unwrap().push(request);
                let answer = if script.len() > 1 { script.pop_front() } else { script.front().cloned() };
                match answer {
                    Some(Answer::Raw(text)) => drop(stream.write_all(text.as_bytes()).await),
                    Some(Answer::Stalls(text)) => {
                        let _ = stream.write_all(text.as_bytes()).await;
                        stalled.push(stream);
                    }
                    Some(Answer::HangUp) | None => {}
                }
            }
        });
        Self { url, requests }
    }

    /// A store on it, patient for at most a second.
    fn store(&self) -> RemoteStore {
        self.store_of(RemoteKind::S3, &S3_KEYS)
    }

    /// The same of any kind, with credentials of any kind.
    fn store_of(&self, kind: RemoteKind, environment: &[(&str, &str)]) -> RemoteStore {
        let config = RemoteConfig {
            kind,
            bucket: Some("disks".into()),
            endpoint_url: Some(self.url.clone()),
            region: None,
            r2_account_id: None,
        };
        let look_up = |name: &str| environment.iter().find(|(n, _)| *n == name).map(|(_, value)| (*value).to_owned());
        let policy = RetryPolicy {
            limit: Duration::from_secs(1),
            first_delay: Duration::from_millis(1),
            max_delay: Duration::from_millis(10),
        };
        RemoteStore::connect(&config, &look_up, policy, Arc::new(SystemClock)).unwrap()
    }

    /// Method and path of each request so far.
    fn lines(&self) -> Vec<String> {
        let requests = self.requests.lock().unwrap();
        requests.iter().map(|r| r.split(" HTTP/1.1").next().unwrap_or_default().to_owned()).collect()
    }
}

/// The head of a request; its body is read too, so that closing does not reset the connection.
async fn read_request(stream: &mut TcpStream) -> Option<String> {
    let mut bytes = Vec::new();
    let head_len = loop {
        if let Some(end) = bytes.windows(4).position(|w| w == b"\r\n\r\n") {
            break end + 4;
        }
        if stream.read_buf(&mut bytes).await.ok()? == 0 {
            return None;
        }
    };
    let head = String::from_utf8_lossy(&bytes[..head_len]).into_owned();
    let body_len = head
        .lines()
        .filter_map(|line| line.split_once(": "))
        .find(|(name, _)| name.eq_ignore_ascii_case("content-length"))
        .map_or(0, |(_, value)| value.trim().parse().unwrap());
    while bytes.len() < head_len + body_len {
        if stream.read_buf(&mut bytes).await.ok()? == 0 {
            return None;
        }
    }
    Some(head)
}

fn head(status: &str, headers: &str) -> String {
    format!("HTTP/1.1 {status}\r\nConnection: close\r\nETag: \"1\"\r\n{headers}\r\n")
}

fn answer(status: &str, headers: &str, body: &str) -> Answer {
    Answer::Raw(head(status, headers) + body)
}

fn sized(status: &str, body: &str) -> Answer {
    answer(status, &format!("Content-Length: {}\r\n", body.len()), body)
}

fn key() -> Key {
    "exports/vm/volume.json".parse().unwrap()
}

async fn range_of_ten_to_twenty(script: Answer) -> Result<Bytes, StoreError> {
    let endpoint = Endpoint::start(&[script]).await;
    endpoint.store().get_range(&key(), ByteRange::new(10, 10).unwrap()).await
}

#[tokio::test]
async fn a_range_is_taken_only_if_it_is_the_one_asked_for_and_all_of_it() {
    let ten = "0123456789";
    let partial = |range: &str, len: usize, body: &str| {
        answer("206 Partial Content", &format!("Content-Range: bytes {range}\r\nContent-Length: {len}\r\n"), body)
    };
    let good = range_of_ten_to_twenty(partial("10-19/100", 10, ten)).await.unwrap();
    assert_eq!(&good[..], ten.as_bytes());

    for (name, script) in [
        ("cut short", partial("10-19/100", 10, "0123")),
        ("shorter than the range says", partial("10-19/100", 4, "0123")),
        ("longer than the range says", partial("10-19/100", 12, "0123456789ab")),
        ("another range", partial("0-9/100", 10, ten)),
        ("a part of the range", partial("10-15/100", 6, "012345")),
        ("the whole object", sized("200 OK", ten)),
        ("no range named", answer("206 Partial Content", "Content-Length: 10\r\n", ten)),
        ("no length", answer("206 Partial Content", "Content-Range: bytes 10-19/100\r\n", ten)),
        ("nonsense", Answer::Raw("SSH-2.0-OpenSSH_9.2\r\n".into())),
        ("nothing", Answer::HangUp),
        ("throttled", sized("503 Slow Down", "<Error><Code>SlowDown</Code></Error>")),
    ] {
        let error = range_of_ten_to_twenty(script).await.unwrap_err();
        assert!(matches!(error, StoreError::Unavailable { .. }), "{name}: {error}");
    }
    for (name, script) in [
        ("the object is shorter", partial("10-14/15", 5, "01234")),
        ("the object is empty", sized("416 Range Not Satisfiable", "<Error><Code>InvalidRange</Code></Error>")),
    ] {
        let error = range_of_ten_to_twenty(script).await.unwrap_err();
        assert!(matches!(error, StoreError::Short { .. }), "{name}: {error}");
    }
    let refusal = sized("403 Forbidden", "<Error><Code>AccessDenied</Code></Error>");
    let error = range_of_ten_to_twenty(refusal).await.unwrap_err();
    assert!(matches!(error, StoreError::Refused { .. }), "{error}");
}

#[tokio::test]
async fn a_whole_object_is_taken_for_a_range_that_covers_all_of_it() {
    let read = async |script: Answer| {
        let endpoint = Endpoint::start(&[script]).await;
        endpoint.store().get_range(&key(), ByteRange::new(0, 10).unwrap()).await
    };
    assert_eq!(read(sized("200 OK", "0123456789")).await.unwrap(), "0123456789");
    let error = read(sized("200 OK", "0123456789a")).await.unwrap_err();
    let said = "asked for bytes 0 to 9, it sent all 11 bytes: it ignores ranges";
    assert!(matches!(error, StoreError::Refused { .. }) && error.to_string().ends_with(said), "{error}");
    let cut = read(answer("200 OK", "Content-Length: 10\r\n", "0123")).await.unwrap_err();
    assert!(matches!(cut, StoreError::Unavailable { .. }), "{cut}");
    for object in ["012345678", "0", ""] {
        let error = read(sized("200 OK", object)).await.unwrap_err();
        let said = format!("it has {} bytes, bytes 0 to 9 were asked for", object.len());
        assert!(matches!(error, StoreError::Short { .. }) && error.to_string().ends_with(&said), "{error}");
    }
}

#[tokio::test]
async fn an_upload_counts_once_the_store_says_that_all_of_it_is_there() {
    let ok = sized("200 OK", "");
    let head = |len: u64| answer("200 OK", &format!("Content-Length: {len}\r\n"), "");
    let whole = MIN_PART_BYTES + 1;
    let multipart = [sized("200 OK", CREATED), ok.clone(), ok.clone(), sized("200 OK", ASSEMBLED)];
    for (found, fine) in [(head(whole), true), (head(whole - 1), false), (sized("404 Not Found", ""), false)] {
        let endpoint = Endpoint::start(&[&multipart[..], &[found]].concat()).await;
        let uploaded = upload_two_parts(&endpoint).await;
        assert_eq!(uploaded.is_ok(), fine, "{uploaded:?}");
        assert!(fine || matches!(uploaded, Err(StoreError::Refused { .. })), "{uploaded:?}");
        assert_eq!(endpoint.lines().iter().filter(|line| line.starts_with("HEAD")).count(), 1);
    }
    for (len, fine) in [(2, true), (1, false)] {
        let endpoint = Endpoint::start(&[ok.clone(), head(len)]).await;
        assert_eq!(call(&endpoint.store(), "upload").await.is_ok(), fine);
        assert_eq!(endpoint.lines().len(), 2);
    }
}

fn page(names: &[&str], more: &str) -> Answer {
    let entry = |name: &&str| {
        format!(
            "<Contents><Key>exports/{name}</Key><Size>1</Size><LastModified>2024-01-01T00:00:00.000Z</LastModified></Contents>"
        )
    };
    let token = format!("<NextContinuationToken>{more}</NextContinuationToken>");
    let names: String = names.iter().map(entry).collect();
    sized(
        "200 OK",
        &format!("<ListBucketResult>{names}{}</ListBucketResult>", if more.is_empty() { "" } else { &token }),
    )
}

#[tokio::test]
async fn a_listing_that_never_ends_is_given_up_early_and_named() {
    let prefix: Key = "exports".parse().unwrap();
    // A token that comes again, at once or in a circle; names on every page or on none.
    for script in [
        vec![page(&["a"], "t1")],
        vec![page(&["a"], "t1"), page(&["b"], "t2"), page(&["c"], "t1")],
        vec![page(&[], "t1")],
    ] {
        let endpoint = Endpoint::start(&script).await;
        let error = endpoint.store().list(&prefix).await.unwrap_err();
        assert!(matches!(error, StoreError::Refused { .. }) && error.to_string().contains("exports"), "{error}");
        assert!(endpoint.lines().len() <= 3, "{:?}", endpoint.lines());
    }
    // Always another token, never another name: up to the limit it may still end.
    for (idle, ends) in [(listing::MAX_IDLE_PAGES, true), (listing::MAX_IDLE_PAGES + 1, false)] {
        let mut script = vec![page(&["a"], "t")];
        script.extend((0..idle).map(|at| page(&[], &format!("t{at}"))));
        script.push(page(&["b"], ""));
        let endpoint = Endpoint::start(&script).await;
        let listed = endpoint.store().list(&prefix).await;
        assert_eq!(listed.is_ok(), ends, "{listed:?}");
    }
}

fn folders(names: std::ops::Range<usize>, len: usize, more: &str) -> Answer {
    let folder = |name| format!("<CommonPrefixes><Prefix>exports/{name:0len$}/</Prefix></CommonPrefixes>");
    let folders: String = names.map(folder).collect();
    let token = if more.is_empty() { "" } else { &format!("<NextContinuationToken>{more}</NextContinuationToken>") };
    sized("200 OK", &format!("<ListBucketResult>{folders}{token}</ListBucketResult>"))
}

#[tokio::test]
async fn a_listing_of_folders_has_a_limit_of_names_and_of_bytes_and_names_the_prefix() {
    let prefix: Key = "exports".parse().unwrap();
    let (half, len) = (MAX_FOLDERS / 2, listing::MEAN_NAME_BYTES);
    for (last, len, fits) in [
        (MAX_FOLDERS, len, true),
        (MAX_FOLDERS + 1, 6, false),
        // Fewer, but each a byte longer.
        (MAX_FOLDERS - 1, len + 1, false),
    ] {
        let script = [folders(0..half, len, "t1"), folders(half..last, len, "")];
        let listed = Endpoint::start(&script).await.store().list_folders(&prefix).await;
        match listed {
            Ok(names) => assert!(fits && names.len() == last, "{} of {last}", names.len()),
            Err(e) => {
                assert!(!fits && matches!(e, StoreError::Refused { .. }), "{e}");
                assert!(e.to_string().contains("list of exports: there are more than 100000 names"), "{e}");
            }
        }
    }
}

#[tokio::test]
async fn an_answer_that_is_no_content_has_a_limit_and_an_object_has_its_callers() {
    let prefix: Key = "exports".parse().unwrap();
    for (len, fits) in [(http::MAX_ANSWER_BYTES, true), (http::MAX_ANSWER_BYTES + 1, false)] {
        let body = "<ListBucketResult></ListBucketResult>";
        let whole = sized("200 OK", &format!("{}{body}", " ".repeat(len - body.len())));
        let endpoint = Endpoint::start(&[whole]).await;
        let listed = endpoint.store().list(&prefix).await;
        assert_eq!(listed.is_ok(), fits, "{listed:?}");
        if let Err(error) = listed {
            assert!(matches!(error, StoreError::Refused { .. }) && error.to_string().contains("exports"), "{error}");
            assert_eq!(endpoint.lines().len(), 1);
        }
    }
    let object = sized("200 OK", &" ".repeat(http::MAX_ANSWER_BYTES + 1));
    Endpoint::start(&[object]).await.store().get(&key(), 1 << 30).await.unwrap();
    // The answer that creates a multipart upload, without an end.
    let endless = format!("HTTP/1.1 200 OK\r\nETag: \"1\"\r\n\r\n{}", " ".repeat(http::MAX_ANSWER_BYTES + 1));
    let endpoint = Endpoint::start(&[Answer::Stalls(endless)]).await;
    let error = upload_two_parts(&endpoint).await.unwrap_err();
    assert!(matches!(error, StoreError::Refused { .. }) && error.to_string().contains("volume.json"), "{error}");
}

/// A lost connection never answers, a new one is served.
async fn after_a_lost_request_all_others_use_new_connections(ends: bool) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let (lost, lost_now) = tokio::sync::watch::channel(false);
    let on_dead = Arc::new(Mutex::new(0));
    let asked_dead = on_dead.clone();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let (lost_now, asked_dead) = (lost_now.clone(), asked_dead.clone());
            let born_lost = *lost_now.borrow();
            tokio::spawn(async move {
                while read_request(&mut stream).await.is_some() {
                    if *lost_now.borrow() && !born_lost {
                        *asked_dead.lock().unwrap() += 1;
                        if ends {
                            return tokio::time::sleep(http::SUSPECT_AFTER + Duration::from_millis(100)).await;
                        }
                        continue;
                    }
                    tokio::time::sleep(Duration::from_millis(200)).await;
                    let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nETag: \"1\"\r\n\r\n7").await;
                }
            });
        }
    });
    let store = Endpoint { url, requests: Arc::default() }.store();
    let key = key();
    let read = || store.get(&key, 9);
    // Several connections, all of them in the pool.
    for outcome in futures_util::future::join_all([read(), read(), read(), read()]).await {
        outcome.unwrap();
    }
    lost.send(true).unwrap();
    let patience = http::SUSPECT_AFTER + Duration::from_millis(if ends { 9_000 } else { 100 });
    assert!(!matches!(tokio::time::timeout(patience, read()).await, Ok(Ok(_))));
    for outcome in futures_util::future::join_all([read(), read(), read(), read()]).await {
        outcome.unwrap();
    }
    assert_eq!(*on_dead.lock().unwrap(), 1);
}

#[tokio::test]
async fn after_a_request_without_an_answer_all_others_use_new_connections() {
    after_a_lost_request_all_others_use_new_connections(false).await;
}

#[tokio::test]
async fn after_a_connection_that_ended_without_an_answer_all_others_use_new_ones() {
    after_a_lost_request_all_others_use_new_connections(true).await;
}

/// What the library would panic on arrives while the server runs: from a service that lends credentials.
#[tokio::test]
async fn a_credential_that_no_request_can_carry_is_an_error_of_that_request() {
    let lent = r#"{"AccessKeyId":"A\nB","SecretAccessKey":"s","Token":"t","Expiration":"2999-01-01T00:00:00Z"}"#;
    let endpoint = Endpoint::start(&[sized("200 OK", lent)]).await;
    let store = endpoint.store_of(
        RemoteKind::S3,
        &[
            ("AWS_CONTAINER_CREDENTIALS_FULL_URI", &endpoint.url),
            ("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", "/proc/self/comm"),
        ],
    );
    let error = store.get(&key(), 9).await.unwrap_err();
    assert!(matches!(error, StoreError::Unavailable { .. }) && error.to_string().contains("credential"), "{error}");
}

#[tokio::test]
async fn white_space_at_the_ends_of_a_token_file_is_cut_off_also_when_it_is_exchanged() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let path = file.path().to_str().unwrap();
    let lent = |expires: &str| {
        let body = r#"{"AccessKeyId":"A","SecretAccessKey":"s","Token":"t","Expiration":"E"}"#.replace('E', expires);
        sized("200 OK", &body)
    };
    let endpoint = Endpoint::start(&[lent("2020-01-01T00:00:00Z")]).await;
    std::fs::write(path, " first-token\r\n").unwrap();
    let store = endpoint.store_of(
        RemoteKind::S3,
        &[("AWS_CONTAINER_CREDENTIALS_FULL_URI", &endpoint.url), ("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", path)],
    );
    let _ = store.get(&key(), 9).await;
    std::fs::write(path, "next\n").unwrap();
    let _ = store.get(&key(), 9).await;
    let requests = endpoint.requests.lock().unwrap().join("").to_ascii_lowercase();
    assert!(requests.contains("authorization: first-token\r\n"), "{requests}");
    assert!(requests.contains("authorization: next\r\n"), "{requests}");
}

#[tokio::test]
async fn a_token_file_that_cannot_be_read_for_a_moment_fails_no_request() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let path = file.path().to_str().unwrap();
    std::fs::write(path, "a-token").unwrap();
    let lent = r#"{"AccessKeyId":"A","SecretAccessKey":"s","Token":"t","Expiration":"2999-01-01T00:00:00Z"}"#;
    let endpoint = Endpoint::start(&[sized("200 OK", lent), sized("200 OK", "7")]).await;
    let store = endpoint.store_of(
        RemoteKind::S3,
        &[("AWS_CONTAINER_CREDENTIALS_FULL_URI", &endpoint.url), ("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", path)],
    );
    store.get(&key(), 9).await.unwrap();
    std::fs::write(path, "").unwrap();
    store.get(&key(), 9).await.unwrap();
    std::fs::remove_file(path).unwrap();
    store.get(&key(), 9).await.unwrap();
    assert_eq!(endpoint.lines().len(), 4, "{:?}", endpoint.lines());
}

#[tokio::test]
async fn a_whole_object_is_taken_only_if_it_is_whole() {
    let endpoint = Endpoint::start(&[answer("200 OK", "Content-Length: 10\r\n", "0123")]).await;
    let error = endpoint.store().get(&key(), 100).await.unwrap_err();
    assert!(matches!(error, StoreError::Unavailable { .. }), "{error}");
    // Announced as too large: refused before the body, which never comes.
    let endpoint = Endpoint::start(&[answer("200 OK", "Content-Length: 101\r\n", "")]).await;
    let error = endpoint.store().get(&key(), 100).await.unwrap_err();
    assert!(matches!(error, StoreError::TooLarge { .. }), "{error}");
}

#[tokio::test]
async fn a_conditional_put_is_one_request_on_the_wire_whatever_the_answer() {
    let conditions = [Condition::IfAbsent, Condition::IfVersion(Version("\"1\"".into()))];
    for condition in conditions {
        for (script, is_conflict) in [
            (sized("500 Internal Server Error", ""), false),
            (sized("503 Slow Down", ""), false),
            (sized("429 Too Many Requests", ""), false),
            (sized("409 Conflict", "<Error><Code>ConditionalRequestConflict</Code></Error>"), false),
            (sized("409 Conflict", "<Error><Code>BlobAlreadyExists</Code></Error>"), true),
            (sized("412 Precondition Failed", ""), true),
            (Answer::HangUp, false),
        ] {
            let endpoint = Endpoint::start(std::slice::from_ref(&script)).await;
            let error = endpoint.store().put(&key(), "{}".into(), condition.clone()).await.unwrap_err();
            assert_eq!(endpoint.lines().len(), 1, "{script:?}");
            let as_expected = match error {
                StoreError::Conflict { .. } => is_conflict,
                StoreError::Unavailable { .. } => !is_conflict,
                _ => false,
            };
            assert!(as_expected, "{script:?}: {error}");
        }
    }
}

#[tokio::test]
async fn a_swap_carries_its_condition_on_the_wire() {
    let endpoint = Endpoint::start(&[sized("200 OK", "")]).await;
    let store = endpoint.store();
    store.put(&key(), "{}".into(), Condition::IfAbsent).await.unwrap();
    store.put(&key(), "{}".into(), Condition::IfVersion(Version("\"7\"".into()))).await.unwrap();
    store.put(&key(), "{}".into(), Condition::Always).await.unwrap();
    let requests = endpoint.requests.lock().unwrap().clone();
    let has = |index: usize, header: &str| requests[index].to_ascii_lowercase().contains(header);
    assert!(has(0, "if-none-match: *\r\n") && !has(0, "if-match"), "{}", requests[0]);
    assert!(has(1, "if-match: \"7\"\r\n") && !has(1, "if-none-match"), "{}", requests[1]);
    assert!(!has(2, "if-match") && !has(2, "if-none-match"), "{}", requests[2]);
}

/// Every kind of request, by the call that makes it.
const CALLS: [&str; 9] = ["get", "get_range", "len", "put", "create", "swap", "upload", "list", "delete"];

async fn call(store: &RemoteStore, name: &str) -> Result<(), StoreError> {
    let (key, range) = (key(), ByteRange::new(10, 10).unwrap());
    let put = async |condition| store.put(&key, "{}".into(), condition).await.map(drop);
    match name {
        "get" => store.get(&key, 100).await.map(drop),
        "get_range" => store.get_range(&key, range).await.map(drop),
        "len" => store.len(&key).await.map(drop),
        "put" => put(Condition::Always).await,
        "create" => put(Condition::IfAbsent).await,
        "swap" => put(Condition::IfVersion(Version("\"1\"".into()))).await,
        "upload" => store.upload(&key, 100, stream::iter([Ok(Bytes::from("{}"))]).boxed()).await,
        "list" => store.list(&key).await.map(drop),
        "delete" => store.delete(&key).await,
        _ => unreachable!("{name}"),
    }
}

const REDIRECTS: [&str; 5] =
    ["301 Moved Permanently", "302 Found", "303 See Other", "307 Temporary Redirect", "308 Permanent Redirect"];

/// What would pass for success, were it believed.
async fn target_of_redirects() -> (Endpoint, Answer, impl Fn(&str) -> Answer) {
    let target = Endpoint::start(&[sized("200 OK", "0123456789")]).await;
    let location = format!("Location: {}/elsewhere?token=t\r\nContent-Length: 0\r\n", target.url);
    (target, sized("200 OK", ""), move |status: &str| answer(status, &location, ""))
}

fn is_refused_with_directions(error: &StoreError, target: &Endpoint) -> bool {
    let directions = format!(
        "it redirects to {url}/elsewhere, and no redirect is followed: if the store is there, use \
                              --endpoint-url {url}",
        url = target.url
    );
    matches!(error, StoreError::Refused { .. }) && error.to_string().ends_with(&directions)
}

#[tokio::test]
async fn no_redirect_is_followed_or_taken_for_an_answer_or_repeated() {
    let (target, _, redirect) = target_of_redirects().await;
    let google = [("GOOGLE_BEARER_TOKEN", "hushhush")];
    let of_s3 = [&S3_KEYS[..], &[("AWS_SESSION_TOKEN", "hushhush")]].concat();
    for status in REDIRECTS {
        for (kind, environment) in
            [(RemoteKind::S3, &of_s3[..]), (RemoteKind::Gcs, &google), (RemoteKind::Azure, &AZURE_KEYS)]
        {
            let endpoint = Endpoint::start(&[redirect(status)]).await;
            let store = endpoint.store_of(kind, environment);
            for name in CALLS {
                let error = call(&store, name).await.expect_err(name);
                assert!(is_refused_with_directions(&error, &target), "{status} {kind:?} {name}: {error}");
            }
            assert_eq!(endpoint.lines().len(), CALLS.len(), "{status} {kind:?}: {:?}", endpoint.lines());
        }
    }
    assert_eq!(target.lines(), [""; 0]);
}

#[tokio::test]
async fn no_redirect_of_a_multipart_upload_is_followed() {
    let (target, ok, redirect) = target_of_redirects().await;
    for status in REDIRECTS {
        let created = sized("200 OK", CREATED);
        for (step, script) in [
            ("creation", vec![redirect(status)]),
            ("part", vec![created.clone(), redirect(status)]),
            ("completion", vec![created, ok.clone(), ok.clone(), redirect(status)]),
        ] {
            let endpoint = Endpoint::start(&script).await;
            let error = upload_two_parts(&endpoint).await.unwrap_err();
            assert!(is_refused_with_directions(&error, &target), "{status} {step}: {error}");
        }
    }
    assert_eq!(target.lines(), [""; 0]);
}

#[tokio::test]
async fn no_redirect_of_a_service_that_lends_credentials_is_followed() {
    let (target, _, redirect) = target_of_redirects().await;
    let token = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(&token, "hushhush").unwrap();
    let token = token.path().to_str().unwrap();
    for status in REDIRECTS {
        let endpoint = Endpoint::start(&[redirect(status)]).await;
        let url = &*endpoint.url;
        let account = ("AZURE_STORAGE_ACCOUNT_NAME", "account");
        for (kind, environment) in [
            (RemoteKind::S3, vec![("AWS_METADATA_ENDPOINT", url)]),
            (
                RemoteKind::S3,
                vec![("AWS_CONTAINER_CREDENTIALS_FULL_URI", url), ("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", token)],
            ),
            (RemoteKind::Azure, vec![account, ("AZURE_MSI_ENDPOINT", url)]),
        ] {
            let error = endpoint.store_of(kind, &environment).get(&key(), 9).await.unwrap_err();
            assert!(is_refused_with_directions(&error, &target), "{status} {environment:?}: {error}");
        }
        assert!(endpoint.lines().iter().all(|line| !line.contains("volume.json")), "{:?}", endpoint.lines());
    }
    assert_eq!(target.lines(), [""; 0]);
}

/// S3 sends no target that could be followed, but says which settings are right.
#[tokio::test]
async fn a_bucket_in_another_region_names_the_settings_to_use() {
    let body = "<Error><Code>PermanentRedirect</Code><Message>Please use another endpoint.</Message>\
                <Endpoint>disks.s3.eu-central-1.amazonaws.com</Endpoint><Bucket>disks</Bucket></Error>";
    let headers = format!("x-amz-bucket-region: eu-central-1\r\nContent-Length: {}\r\n", body.len());
    let endpoint = Endpoint::start(&[answer("301 Moved Permanently", &headers, body)]).await;
    let text = endpoint.store().get(&key(), 9).await.unwrap_err().to_string();
    let said = "answered HTTP 301 PermanentRedirect: Please use another endpoint.; the bucket is elsewhere: use --region \
                eu-central-1 and --endpoint-url http://s3.eu-central-1.amazonaws.com";
    assert!(text.ends_with(said), "{text}");
}

#[tokio::test]
async fn an_error_whose_body_never_ends_is_told_by_its_status() {
    let endpoint = Endpoint::start(&[Answer::Stalls(head("403 Forbidden", "Content-Length: 9\r\n"))]).await;
    let error = endpoint.store().get(&key(), 9).await.unwrap_err();
    assert!(matches!(error, StoreError::Refused { .. }) && error.to_string().ends_with("HTTP 403"), "{error}");
}

#[tokio::test]
async fn no_error_repeats_a_credential() {
    let echo = "<Error><Code>SignatureDoesNotMatch</Code><Message>The signature does not match.</Message>\
                <AWSAccessKeyId>AKIDEXAMPLE</AWSAccessKeyId><StringToSign>hushhush</StringToSign></Error>";
    for script in [sized("403 Forbidden", echo), sized("500 Oops", echo), Answer::HangUp] {
        let endpoint = Endpoint::start(&[script]).await;
        let error = endpoint.store().get(&key(), 9).await.unwrap_err();
        for text in [error.to_string(), format!("{error:?}")] {
            assert!(!text.contains("AKIDEXAMPLE") && !text.contains("hushhush"), "{text}");
        }
    }
}

#[tokio::test]
async fn what_lends_credentials_says_nothing_about_objects() {
    for status in ["404 Not Found", "410 Gone"] {
        let endpoint =
            Endpoint::start(&[sized(status, r#"{"error":"not_ready","error_description":"come back"}"#)]).await;
        let identity = format!("{}/identity", endpoint.url);
        for store in [
            endpoint.store_of(RemoteKind::S3, &[("AWS_METADATA_ENDPOINT", &endpoint.url)]),
            endpoint.store_of(
                RemoteKind::Azure,
                &[("AZURE_STORAGE_ACCOUNT_NAME", "account"), ("AZURE_MSI_ENDPOINT", &identity)],
            ),
        ] {
            let read = store.get(&key(), 9).await.map(drop).unwrap_err();
            let created = store.put(&key(), "{}".into(), Condition::IfAbsent).await.map(drop).unwrap_err();
            for error in [read, created] {
                let said = format!("127.0.0.1 answered HTTP {} not_ready: come back", &status[..3]);
                let text = error.to_string();
                assert!(matches!(error, StoreError::Unavailable { .. }) && text.ends_with(&said), "{text}");
            }
        }
        assert!(endpoint.lines().iter().all(|line| !line.contains("volume.json")), "{:?}", endpoint.lines());
    }
}

#[tokio::test]
async fn an_absent_object_is_not_found_by_the_word_of_any_store() {
    for (kind, environment, code, header) in [
        (RemoteKind::S3, &S3_KEYS[..], "NoSuchKey", ""),
        (RemoteKind::Gcs, &[("GOOGLE_BEARER_TOKEN", "hushhush")], "NoSuchKey", ""),
        (RemoteKind::Azure, &AZURE_KEYS, "BlobNotFound", ""),
        (RemoteKind::Azure, &AZURE_KEYS, "", "x-ms-error-code: BlobNotFound\r\n"),
    ] {
        let body = if code.is_empty() { String::new() } else { format!("<Error><Code>{code}</Code></Error>") };
        let headers = format!("{header}Content-Length: {}\r\n", body.len());
        let endpoint = Endpoint::start(&[answer("404 Not Found", &headers, &body)]).await;
        let store = endpoint.store_of(kind, environment);
        let error = store.get(&key(), 9).await.unwrap_err();
        assert!(matches!(error, StoreError::NotFound { .. }), "{kind:?}: {error}");
        store.delete(&key()).await.unwrap();
    }
}

const CREATED: &str = "<InitiateMultipartUploadResult><UploadId>u1</UploadId></InitiateMultipartUploadResult>";
const ASSEMBLED: &str = "<CompleteMultipartUploadResult><ETag>\"9\"</ETag></CompleteMultipartUploadResult>";

/// Uploads two parts, the second of one byte.
async fn upload_two_parts(endpoint: &Endpoint) -> Result<(), StoreError> {
    upload_two_parts_to(endpoint.store()).await
}

async fn upload_two_parts_to(store: RemoteStore) -> Result<(), StoreError> {
    let content = Bytes::from(vec![7; usize::try_from(MIN_PART_BYTES).unwrap() + 1]);
    store.upload(&key(), 1 << 30, stream::iter([Ok(content)]).boxed()).await
}

#[tokio::test]
async fn a_part_that_was_throttled_is_sent_again() {
    let busy = sized("503 Slow Down", "");
    let ok = sized("200 OK", "");
    let found = answer("200 OK", &format!("Content-Length: {}\r\n", MIN_PART_BYTES + 1), "");
    let script = [sized("200 OK", CREATED), busy.clone(), busy, ok.clone(), ok, sized("200 OK", ASSEMBLED), found];
    let endpoint = Endpoint::start(&script).await;
    upload_two_parts(&endpoint).await.unwrap();
    let lines = endpoint.lines();
    assert_eq!(lines.iter().filter(|line| line.starts_with("PUT")).count(), 4, "{lines:?}");
    assert!(!lines.iter().any(|line| line.starts_with("DELETE")), "{lines:?}");
}

#[tokio::test]
async fn an_upload_that_cannot_be_finished_is_discarded() {
    let script = [sized("200 OK", CREATED), sized("403 Forbidden", "<Error><Code>AccessDenied</Code></Error>")];
    let endpoint = Endpoint::start(&script).await;
    let error = upload_two_parts(&endpoint).await.unwrap_err();
    assert!(matches!(error, StoreError::Refused { .. }), "{error}");
    let last = endpoint.lines().pop().unwrap();
    assert!(last.starts_with("DELETE") && last.contains("uploadId=u1"), "{last}");
}

#[tokio::test]
async fn who_gives_an_upload_up_removes_objects_once_its_parts_are_discarded() {
    let endpoint = Endpoint::start(&[sized("200 OK", CREATED), sized("200 OK", "")]).await;
    let (store, key) = (endpoint.store(), key());
    let content = Bytes::from(vec![7; usize::try_from(MIN_PART_BYTES + 1).unwrap()]);
    let mut upload = store.upload(&key, 1 << 30, stream::iter([Ok(content)]).chain(stream::pending()).boxed());
    while !endpoint.lines().iter().any(|line| line.starts_with("PUT")) {
        assert!(tokio::time::timeout(Duration::from_millis(1), &mut upload).await.is_err());
    }
    drop(upload);
    store.delete(&key).await.unwrap();
    let removed: Vec<_> = endpoint.lines().into_iter().filter(|line| line.starts_with("DELETE")).collect();
    assert_eq!(removed.iter().map(|line| line.contains("uploadId=u1")).collect::<Vec<_>>(), [true, false]);
}

#[tokio::test]
async fn an_assembly_whose_answer_was_lost_is_settled_by_looking_at_the_object() {
    let ok = sized("200 OK", "");
    let gone = sized("404 Not Found", "<Error><Code>NoSuchUpload</Code></Error>");
    let lost = [sized("200 OK", CREATED), ok.clone(), ok, Answer::HangUp, gone];
    let head = |len: u64| answer("200 OK", &format!("Content-Length: {len}\r\n"), "");

    let landed = [&lost[..], &[head(MIN_PART_BYTES + 1)]].concat();
    upload_two_parts(&Endpoint::start(&landed).await).await.unwrap();

    let other = [&lost[..], &[head(5)]].concat();
    let error = upload_two_parts(&Endpoint::start(&other).await).await.unwrap_err();
    assert!(matches!(error, StoreError::Refused { .. }), "{error}");

    let nothing = [&lost[..], &[sized("404 Not Found", "")]].concat();
    let error = upload_two_parts(&Endpoint::start(&nothing).await).await.unwrap_err();
    assert!(matches!(error, StoreError::Unavailable { .. }), "{error}");
}

/// Azure forgets no upload: a list of blocks that are part of the blob already is one of blocks it does not know.
#[tokio::test]
async fn an_assembly_that_azure_takes_for_a_wrong_one_is_settled_by_looking_at_the_object() {
    let ok = sized("201 Created", "");
    let wrong = sized("400 Bad Request", "<Error><Code>InvalidBlockList</Code></Error>");
    let lost = [ok.clone(), ok, Answer::HangUp, wrong.clone()];
    let date = "Last-Modified: Thu, 01 Jan 2026 00:00:00 GMT\r\n";
    let head = |len: u64| answer("200 OK", &format!("{date}Content-Length: {len}\r\n"), "");
    let upload = async |script: &[Answer]| {
        let endpoint = Endpoint::start(script).await;
        let uploaded = upload_two_parts_to(endpoint.store_of(RemoteKind::Azure, &AZURE_KEYS)).await;
        (uploaded, endpoint.lines())
    };

    let (landed, lines) = upload(&[&lost[..], &[head(MIN_PART_BYTES + 1)]].concat()).await;
    landed.unwrap();
    assert!(lines.last().unwrap().starts_with("HEAD"), "{lines:?}");

    let (other, _) = upload(&[&lost[..], &[head(5)]].concat()).await;
    assert!(matches!(other, Err(StoreError::Refused { .. })), "{other:?}");

    let (nothing, _) = upload(&[&lost[..], &[sized("404 Not Found", "")]].concat()).await;
    assert!(matches!(nothing, Err(StoreError::Unavailable { .. })), "{nothing:?}");

    // Without an attempt that was unclear it is what it says.
    let (refused, lines) = upload(&[&lost[..2], &[wrong]].concat()).await;
    assert!(matches!(refused, Err(StoreError::Refused { .. })), "{refused:?}");
    assert!(!lines.iter().any(|line| line.starts_with("HEAD")), "{lines:?}");
}

#[tokio::test]
async fn a_page_of_a_listing_that_failed_is_asked_for_again_alone() {
    let page = |name: &str, more: &str| {
        let entry = format!(
            "<Contents><Key>exports/{name}</Key><Size>1</Size><LastModified>2024-01-01T00:00:00.000Z</LastModified></Contents>"
        );
        sized("200 OK", &format!("<ListBucketResult>{entry}{more}</ListBucketResult>"))
    };
    let more = "<NextContinuationToken>t1</NextContinuationToken>";
    let script = [page("b", more), sized("503 Slow Down", ""), Answer::HangUp, page("a", "")];
    let endpoint = Endpoint::start(&script).await;
    let keys = endpoint.store().list(&"exports".parse().unwrap()).await.unwrap();
    assert_eq!(keys.iter().map(Key::as_str).collect::<Vec<_>>(), ["exports/a", "exports/b"]);
    let lines = endpoint.lines();
    assert_eq!(lines.iter().filter(|line| line.contains("continuation-token=t1")).count(), 3, "{lines:?}");
    assert_eq!(lines.len(), 4, "{lines:?}");
}

/// What is meant to work around it asks for pages from behind the name, which not every store knows.
#[tokio::test]
async fn a_name_that_cannot_be_left_out_of_a_listing_is_named_with_the_remedy() {
    let page = "<ListBucketResult><CommonPrefixes><Prefix>exports//</Prefix></CommonPrefixes></ListBucketResult>";
    let endpoint = Endpoint::start(&[sized("200 OK", page)]).await;
    let error = endpoint.store().list_folders(&"exports".parse().unwrap()).await.unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, StoreError::Refused { .. }) && text.contains("\"exports//\""), "{text}");
    assert!(text.contains("move or delete"), "{text}");
}

#[tokio::test]
async fn a_hundred_names_are_left_out_of_a_listing_and_one_more_is_named_with_the_remedy() {
    const END: &str = "<ListBucketResult></ListBucketResult>";
    for (strays, listed) in [(listing::MAX_STRAYS, true), (listing::MAX_STRAYS + 1, false)] {
        let page = |stray: usize| {
            let prefix = format!("<CommonPrefixes><Prefix>exports/{stray:03}//</Prefix></CommonPrefixes>");
            sized("200 OK", &format!("<ListBucketResult>{prefix}</ListBucketResult>"))
        };
        // A page of a thousand names is halved nine times until there is one on it.
        let pages = (0..strays).flat_map(|stray| vec![page(stray); 10]).chain([sized("200 OK", END)]);
        let endpoint = Endpoint::start(&pages.collect::<Vec<_>>()).await;
        let listing = endpoint.store().list_folders(&"exports".parse().unwrap()).await;
        if listed {
            assert!(listing.unwrap().is_empty());
            continue;
        }
        let text = listing.unwrap_err().to_string();
        assert!(text.contains("exports/100//") && text.contains("move or delete"), "{text}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_body_that_stops_arriving_is_given_up_after_the_limit_of_silence() {
    let key = key();
    let request = Request { operation: "get", key: &key };
    let dribble = |pause: Duration| {
        let pieces = stream::iter(["01", "23"]).then(move |piece| async move {
            tokio::time::sleep(pause).await;
            Ok(Bytes::from(piece))
        });
        let meta = ObjectMeta {
            location: Path::from("x"),
            last_modified: chrono::DateTime::UNIX_EPOCH,
            size: 4,
            e_tag: None,
            version: None,
        };
        GetResult {
            payload: object_store::GetResultPayload::Stream(pieces.boxed()),
            meta,
            range: 0..4,
            attributes: object_store::Attributes::default(),
            extensions: object_store::Extensions::default(),
        }
    };
    let second = Duration::from_secs(1);
    let slow = read_body(request, dribble(SILENCE_LIMIT - second), 4).await.unwrap();
    assert_eq!(&slow[..], b"0123");
    let start = tokio::time::Instant::now();
    let error = read_body(request, dribble(SILENCE_LIMIT + second), 4).await.unwrap_err();
    assert!(matches!(error, StoreError::Unavailable { .. }), "{error}");
    assert_eq!(start.elapsed().as_secs(), SILENCE_LIMIT.as_secs());
}

#[tokio::test]
async fn a_port_where_nobody_listens_is_an_outage() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    let error = Endpoint { url, requests: Arc::default() }.store().get(&key(), 9).await.unwrap_err();
    assert!(matches!(error, StoreError::Unavailable { .. }), "{error}");
}

#[test]
fn a_request_may_take_longer_the_more_it_carries() {
    assert_eq!(allowance(0), SILENCE_LIMIT);
    assert_eq!(allowance(8 << 20), SILENCE_LIMIT + Duration::from_secs(128));
}
