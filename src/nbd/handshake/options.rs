//! The data of options, from untrusted bytes to values that fit together. Pure.

use crate::nbd::wire::{MAX_STRING_BYTES, Reader};

/// Why an option's data is refused; a text for the client.
pub(super) type Malformed = &'static str;

/// What INFO and GO carry.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct InfoRequest {
    /// The export's name; empty: the default.
    pub(super) name: String,
    /// The kinds of information asked for.
    pub(super) infos: Vec<u16>,
}

/// What LIST_META_CONTEXT and SET_META_CONTEXT carry.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct MetaRequest {
    /// The export's name; empty: the default.
    pub(super) name: String,
    /// The queries, in order.
    pub(super) queries: Vec<String>,
}

/// "Strings: UTF-8, no NUL, MUST be at most 4096 bytes."
pub(super) fn string(bytes: &[u8]) -> Result<String, Malformed> {
    if bytes.len() > MAX_STRING_BYTES {
        return Err("the name or query is longer than the 4096 bytes the protocol allows: shorten it");
    }
    match std::str::from_utf8(bytes) {
        Ok(text) if !text.contains('\0') => Ok(text.to_owned()),
        Ok(_) => Err("the name or query has a NUL in it: remove it"),
        Err(_) => Err("the name or query is not UTF-8: encode it so"),
    }
}

impl InfoRequest {
    /// "u32 nlen (MUST be ≤ len − 6), name, u16 n, n × u16"; and nothing behind it.
    pub(super) fn parse(data: &[u8]) -> Result<Self, Malformed> {
        const LENGTHS: Malformed = "the lengths do not add up: send u32 name length, name, u16 count, count × u16";
        let mut reader = Reader(data);
        let name = reader.string().ok_or(LENGTHS)?;
        let count = reader.u16().ok_or(LENGTHS)?;
        let infos: Vec<u16> = std::iter::from_fn(|| reader.u16()).collect();
        if infos.len() != usize::from(count) || !reader.0.is_empty() {
            return Err(LENGTHS);
        }
        Ok(Self { name: string(name)?, infos })
    }
}

impl MetaRequest {
    /// "u32 nlen, name, u32 nq, nq × {u32 qlen, query}"; an overrun MUST be refused.
    pub(super) fn parse(data: &[u8]) -> Result<Self, Malformed> {
        const LENGTHS: Malformed =
            "the lengths do not add up: send u32 name length, name, u32 count, count × (u32 query length, query)";
        let mut reader = Reader(data);
        let name = reader.string().ok_or(LENGTHS)?;
        let count = reader.u32().ok_or(LENGTHS)?;
        // No capacity from `count`: it is the client's word, and may be 2^32 − 1.
        let mut queries = Vec::new();
        for _ in 0..count {
            queries.push(string(reader.string().ok_or(LENGTHS)?)?);
        }
        if !reader.0.is_empty() {
            return Err(LENGTHS);
        }
        Ok(Self { name: string(name)?, queries })
    }
}
