//! The `nbd-server` program.

fn main() {}
