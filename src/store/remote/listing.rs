//! Listings, one page after the other.
//!
//! A bucket may hold names that no key can have, such as `exports//x`, and the crate takes none of a page that has one. Then
//! the pages are made smaller until the name is alone on its page, and the listing goes on behind it: a stray object must not
//! keep a server from finding its exports.

use std::collections::HashSet;

use object_store::list::PaginatedListOptions;
use object_store::{Error, ListResult, path};

use super::{Conditional, RemoteStore, SILENCE_LIMIT, timed};
use crate::store::retry::{Overtime, Request};
use crate::store::{Key, MAX_LISTED, StoreError};

/// How many names stores return on a page, or more.
const PAGE_NAMES: usize = 1_000;
/// The most pages one listing takes.
const MAX_LIST_PAGES: usize = MAX_LISTED / PAGE_NAMES;
/// The most pages of a listing that tell of no name behind those before: services send few, one that sends many never ends.
pub(super) const MAX_IDLE_PAGES: usize = 100;
/// The most names that a listing leaves out; each takes ten pages to get around.
pub(super) const MAX_STRAYS: usize = 100;

impl RemoteStore {
    /// Hands over one page after the other, each repeated by itself.
    pub(super) async fn pages(
        &self,
        prefix: &Key,
        delimiter: Option<&'static str>,
        mut take: impl FnMut(ListResult) + Send,
    ) -> Result<(), StoreError> {
        let request = Request { operation: "list", key: prefix };
        let below = format!("{prefix}/");
        let delimiter = delimiter.map(Into::into);
        let mut options = PaginatedListOptions { delimiter, ..PaginatedListOptions::default() };
        let (mut strays, mut idle, mut last, mut tokens) = (0, 0, String::new(), HashSet::new());
        for _ in 0..MAX_LIST_PAGES {
            let page = || {
                let listed = self.pages.list_paginated(Some(&below), options.clone());
                let apart = async {
                    match listed.await {
                        Err(Error::InvalidPath { source }) => Ok(Err(source)),
                        other => other.map(Ok),
                    }
                };
                timed(request, SILENCE_LIMIT, Conditional::No, apart)
            };
            match self.policy.run(&*self.clock, &self.health, request, Overtime::Cut, page).await? {
                Ok(page) => {
                    let names = page.result.objects.iter().map(|object| object.location.as_ref());
                    let greatest = names.chain(page.result.common_prefixes.iter().map(AsRef::as_ref)).max();
                    let goes_on = greatest.filter(|name| *name > last.as_str()).map(str::to_owned);
                    take(page.result);
                    let Some(token) = page.page_token else { return Ok(()) };
                    if !tokens.insert(token.clone()) {
                        return Err(request
                            .refused("the listing goes in circles: a page names itself or one before as the next"));
                    }
                    idle += usize::from(goes_on.is_none());
                    if idle > MAX_IDLE_PAGES {
                        let text = format!("the listing does not end: {idle} pages had no name behind those before");
                        return Err(request.refused(text));
                    }
                    last = goes_on.unwrap_or(last);
                    options.page_token = Some(token);
                }
                Err(stray) => {
                    options = around(&stray, options).map_err(|reason| request.refused(reason))?;
                    strays += usize::from(options.max_keys.is_none());
                    if strays > MAX_STRAYS {
                        let text = format!("{stray}, as are {MAX_STRAYS} names before it: move or delete them");
                        return Err(request.refused(text));
                    }
                }
            }
        }
        Err(request.refused(format!("there are more than {MAX_LISTED} names; choose a longer prefix")))
    }
}

/// What to ask for instead of a page with a name that is no path, or why that cannot be helped.
fn around(stray: &path::Error, options: PaginatedListOptions) -> Result<PaginatedListOptions, String> {
    let (path::Error::EmptySegment { path } | path::Error::BadSegment { path, .. }) = stray else {
        return Err(stray.to_string());
    };
    if options.max_keys != Some(1) {
        return Ok(PaginatedListOptions { max_keys: Some(options.max_keys.unwrap_or(PAGE_NAMES) / 2), ..options });
    }
    let behind = match path.strip_suffix('/') {
        // Behind all of a folder, as '0' is the character after '/'.
        Some(folder) if options.delimiter.is_some() => format!("{folder}0"),
        _ => path.clone(),
    };
    if options.offset.is_some_and(|offset| offset >= behind) {
        return Err(format!("{path:?} cannot be the name of an object here: move or delete what is under it"));
    }
    Ok(PaginatedListOptions { offset: Some(behind), max_keys: None, page_token: None, ..options })
}
