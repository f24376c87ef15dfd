//! A store that lives and dies with the process: for trying things out, and for tests.

use std::sync::Arc;

use futures_util::TryStreamExt;
use object_store::list::{PaginatedListOptions, PaginatedListResult, PaginatedListStore};
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{ListResult, ObjectStore};

use super::upload::Discards;
use super::{RemoteStore, VersionTag};
use crate::clock::{Clock, SystemClock};
use crate::store::health::Health;
use crate::store::retry::RetryPolicy;

impl RemoteStore {
    /// An empty store in memory.
    #[must_use]
    pub fn memory() -> Self {
        let memory = Arc::new(InMemory::new());
        let clock = Arc::new(SystemClock);
        let health = Arc::new(Health::new(clock.now()));
        Self {
            objects: memory.clone(),
            parts: memory.clone(),
            pages: Arc::new(OnePage(memory)),
            tag: VersionTag::ETag,
            keeps_payloads: true,
            discards: Discards::default(),
            place: "memory".into(),
            policy: RetryPolicy::default(),
            clock,
            health,
        }
    }
}

/// The crate's memory store lists without pages; this gives it a single one.
struct OnePage(Arc<InMemory>);

#[async_trait::async_trait]
impl PaginatedListStore for OnePage {
    async fn list_paginated(
        &self,
        prefix: Option<&str>,
        options: PaginatedListOptions,
    ) -> object_store::Result<PaginatedListResult> {
        let prefix = Path::parse(prefix.unwrap_or_default())?;
        let result = if options.delimiter.is_some() {
            self.0.list_with_delimiter(Some(&prefix)).await?
        } else {
            let objects = self.0.list(Some(&prefix)).try_collect().await?;
            ListResult { common_prefixes: Vec::new(), objects, extensions: options.extensions }
        };
        Ok(PaginatedListResult { result, page_token: None })
    }
}
