use std::future::pending;
use std::sync::Arc;

use super::*;
use crate::store::remote::RemoteStore;

fn key() -> Key {
    "exports/vm/volume.json".parse().unwrap()
}

fn observed() -> Observed {
    Observed::new(Arc::new(RemoteStore::memory()))
}

fn text(store: &Observed) -> String {
    let mut page = Page::default();
    store.describe(&mut page);
    page.into_text()
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
    ] {
        assert!(text.contains(line), "{line}\n{text}");
    }
}

#[tokio::test]
async fn a_request_that_is_given_up_from_above_is_counted() {
    let store = observed();
    let given_up = store.observe(Operation::Get, pending::<Result<(), StoreError>>());
    let soon = std::time::Duration::from_millis(5);
    assert!(tokio::time::timeout(soon, given_up).await.is_err());
    let text = text(&store);
    assert!(text.contains(r#"{operation="get",outcome="abandoned"} 1"#));
}
