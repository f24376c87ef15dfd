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
use crate::store::{Key, StoreError};

/// How many names stores return on a page, or more.
const PAGE_NAMES: usize = 1_000;
/// The most bytes that names have on average, without the prefix: bounds them all together.
pub(super) const MEAN_NAME_BYTES: usize = 128;
/// The most pages of a listing that tell of no name behind those before: services send few, one that sends many never ends.
pub(super) const MAX_IDLE_PAGES: usize = 100;
/// The most names that a listing leaves out.
pub(super) const MAX_STRAYS: usize = 100;
/// The pages that it takes to get around one.
const STRAY_PAGES: usize = 11;

impl RemoteStore {
    /// Hands over one page after the other, each repeated by itself; refused if there are more than `max_names` names.
    pub(super) async fn pages(
        &self,
        prefix: &Key,
        delimiter: Option<&'static str>,
        max_names: usize,
        mut take: impl FnMut(ListResult) + Send,
    ) -> Result<(), StoreError> {
        let request = Request { operation: "list", key: prefix };
        let below = format!("{prefix}/");
        let delimiter = delimiter.map(Into::into);
        let mut options = PaginatedListOptions { delimiter, ..PaginatedListOptions::default() };
        let (mut strays, mut idle, mut last, mut tokens) = (0, 0, String::new(), HashSet::new());
        let (max_bytes, mut names, mut bytes) = (max_names * MEAN_NAME_BYTES, 0, 0);
        for _ in 0..max_names / PAGE_NAMES + MAX_IDLE_PAGES + MAX_STRAYS * STRAY_PAGES {
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
                    let goes_on = names_of(&page.result).max().filter(|name| *name > last.as_str()).map(str::to_owned);
                    for name in names_of(&page.result) {
                        names += 1;
                        bytes += name.len().saturating_sub(below.len());
                    }
                    if names > max_names || bytes > max_bytes {
                        break;
                    }
                    take(page.result);
                    let Some(token) = page.page_token else { return Ok(()) };
                    if !tokens.insert(*blake3::hash(token.as_bytes()).as_bytes()) {
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
        let text =
            format!("there are more than {max_names} names, or {max_bytes} bytes of them; choose a longer prefix");
        Err(request.refused(text))
    }
}

fn names_of(page: &ListResult) -> impl Iterator<Item = &str> {
    let objects = page.objects.iter().map(|object| object.location.as_ref());
    objects.chain(page.common_prefixes.iter().map(AsRef::as_ref))
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
