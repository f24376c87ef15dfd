use std::future::pending;

use super::*;
use crate::clock::SystemClock;
use crate::store::remote::RemoteStore;
use crate::store::retry::Request;

fn key() -> Key {
    "exports/vm/volume.json".parse().unwrap()
}

fn observed() -> Observed {
    Observed::new(Arc::new(RemoteStore::memory()), Arc::new(SystemClock))
}

fn text(store: &Observed) -> String {
    let mut page = Page::default();
    store.describe(&mut page);
    page.into_text()
}

async fn end(store: &Observed, error: Option<StoreError>) {
    let outcome = error.map_or(Ok(()), Err);
    let _ = store.observe(Operation::Delete, async { outcome }).await;
}

#[tokio::test]
async fn each_request_is_passed_on_and_counted_by_how_it_ended() {
    let store = observed();
    assert!(matches!(store.get(&key(), 9).await, Err(StoreError::NotFound { .. })));
    let version = store.put(&key(), "it".into(), Condition::IfAbsent).await.unwrap();
    assert!(matches!(store.put(&key(), "it".into(), Condition::IfAbsent).await, Err(StoreError::Conflict { .. })));
    assert_eq!(store.get(&key(), 9).await.unwrap(), Object { bytes: "it".into(), version });
    assert_eq!(store.list_folders(&"exports".parse().unwrap()).await.unwrap(), ["vm"]);
    store.delete(&key()).await.unwrap();
    let text = text(&store);
    for line in [
        r#"nbd_server_store_requests_total{operation="get",outcome="not_found"} 1"#,
        r#"nbd_server_store_requests_total{operation="get",outcome="ok"} 1"#,
        r#"nbd_server_store_requests_total{operation="put",outcome="conflict"} 1"#,
        r#"nbd_server_store_requests_total{operation="put",outcome="ok"} 1"#,
        r#"nbd_server_store_requests_total{operation="list",outcome="ok"} 1"#,
        r#"nbd_server_store_requests_total{operation="delete",outcome="ok"} 1"#,
        r#"nbd_server_store_request_duration_seconds_count{operation="put"} 2"#,
        "nbd_server_store_up 1",
    ] {
        assert!(text.contains(line), "{line}\n{text}");
    }
}

#[tokio::test]
async fn a_store_is_up_as_long_as_it_gives_definite_answers() {
    let store = observed();
    let request = Request { operation: "delete", key: &key() };
    let at_first = store.reachability();
    end(&store, Some(StoreError::Conflict { key: key() })).await;
    end(&store, Some(StoreError::Body { key: key(), source: "the disk".into() })).await;
    assert_eq!(store.reachability(), at_first);
    end(&store, Some(request.unavailable("the lights are out"))).await;
    let down = store.reachability();
    assert!(!down.up && down.last_error.as_ref().unwrap().0.contains("the lights are out"));
    assert!(text(&store).contains("nbd_server_store_up 0"));
    end(&store, Some(request.refused("go away"))).await;
    end(&store, Some(StoreError::Body { key: key(), source: "the disk".into() })).await;
    let still = store.reachability();
    assert_eq!((still.up, still.since), (false, down.since), "since the first failure");
    assert!(still.last_error.as_ref().unwrap().0.contains("go away"));
    end(&store, None).await;
    let up = store.reachability();
    assert!(up.up && up.since >= down.since);
    assert_eq!(up.last_error, still.last_error, "what was wrong can still be read");
}

#[tokio::test]
async fn a_request_that_is_given_up_from_above_is_counted_and_says_nothing_of_the_store() {
    let store = observed();
    let given_up = store.observe(Operation::Get, pending::<Result<(), StoreError>>());
    let soon = std::time::Duration::from_millis(5);
    assert!(tokio::time::timeout(soon, given_up).await.is_err());
    let text = text(&store);
    assert!(text.contains(r#"{operation="get",outcome="abandoned"} 1"#) && text.contains("nbd_server_store_up 1"));
}
