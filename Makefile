# Everything a newcomer runs. Each target installs what it needs first (scripts/), and says so.
PATH := $(PATH):$(HOME)/.cargo/bin
LOG ?= embedded
export LOG KEEP

.PHONY: build test demo bench fuzz fmt lint install help

help: ## Show this
	@sed -n 's/^\([a-z]*\):.*## /  make \1  \t/p' $(MAKEFILE_LIST)

install: ## Install compilers and the servers that tests and demo run on
	@scripts/install-build.sh
	@scripts/install-postgresql.sh
	@scripts/install-kafka.sh
	@scripts/install-apicurio.sh
	@scripts/install-python-clients.sh
	@scripts/tryton/template.sh >/dev/null

build: ## Build target/release/tidegate
	@scripts/install-build.sh
	cargo build --release --locked

test: install ## Run all tests on real servers (PostgreSQL, Kafka, Apicurio, Tryton)
	@scripts/test.sh

demo: ## A shop, an ERP and a CRM kept in step: LOG=kafka for a Kafka broker, KEEP=1 to leave it running
	@scripts/demo.sh

bench: build ## Measure capture beside pg_recvlogical
	@scripts/bench.sh

SECONDS ?= 300
fuzz: ## Feed random bytes to every decoder of outside bytes, SECONDS each (needs cargo-fuzz)
	@scripts/install-build.sh
	@command -v cargo-fuzz >/dev/null || cargo install cargo-fuzz --locked
	for target in pgoutput avro_decode; do \
		ASAN_OPTIONS=detect_odr_violation=0 RUSTC_BOOTSTRAP=1 cargo fuzz run $$target -- -max_total_time=$(SECONDS) || exit 1; done

fmt: ## Format the code
	cargo fmt

lint: ## Check format and clippy
	cargo fmt --check
	cargo clippy --all-targets --locked -- -D warnings
