# Two commands matter: `make test` installs what is missing and runs every test; `make check` looks at the source.

.PHONY: all setup test check fmt

all: check test

setup:
	scripts/setup.sh

test: setup
	cargo test --locked --no-fail-fast
	cargo test --locked --no-fail-fast --features shuttle --test interleavings

check:
	cargo fmt --check
	cargo clippy --locked --all-targets -- -D warnings
	cargo clippy --locked --features shuttle --test interleavings -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --no-deps

fmt:
	cargo fmt
