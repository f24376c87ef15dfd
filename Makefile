# Two commands matter: `make test` installs what is missing and runs every test; `make check` looks at the source.

.PHONY: all setup test check sabotage deb fmt bench bench-quick bench-cold

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

# Breaks each rule of docs/testing.md in a build of its own and sees to it that a test catches it.
sabotage: setup
	scripts/sabotage.py

# A Debian package, by what Cargo.toml says of it, with man pages and completions; prints where it is.
deb: setup
	cargo build --release --locked --bin nbd-server
	mkdir -p target/release/man
	target/release/nbd-server man target/release/man
	target/release/nbd-server completions bash >target/release/man/nbd-server.bash
	scripts/licenses.py target/release/THIRD-PARTY-LICENSES
	.tools/bin/cargo-deb --no-build

# Writes docs/benchmarks.md. On a machine that does nothing else meanwhile.
bench bench-quick:
	scripts/setup.sh bench
	cargo build --locked --release --bin nbd-server --example ceiling
	cargo bench --locked --bench cold --no-run
	/usr/bin/python3 benches/side_by_side.py $(if $(filter bench-quick,$@),--quick)

# Measures the cold path and publishing; some minutes.
bench-cold:
	cargo bench --locked --bench cold

fmt:
	cargo fmt
