//! What the test suites share: each uses some of it.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

pub mod moto;
pub mod sim;
pub mod volumes;
pub mod watched;
