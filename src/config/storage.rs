//! The flags that say where published snapshots live: those of `serve`, and of every command that goes to the store
//! without a server.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::builder::BoolishValueParser;
use clap::{ArgAction, Args, ValueEnum};

use super::{ConfigError, MAX_EXPORT_ROOT_BYTES, StoreConfig, Surroundings};
use crate::store::keys::{ExportRoot, Key};
use crate::store::remote::{RemoteConfig, RemoteKind};

/// The longest wait for the store that can be asked for.
const MAX_STORE_TIMEOUT_SECS: u64 = 86_400;

/// How the store is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoreAccess {
    /// The store.
    pub store: StoreConfig,
    /// Where in it the exports are.
    pub export_root: ExportRoot,
    /// How long one that does not answer is waited for.
    pub timeout: Duration,
    /// Whether one is written to that the probe found unfit.
    pub allow_unsafe: bool,
}

/// The flags, as written.
#[derive(Debug, Args)]
pub struct Storage {
    /// TOML file with settings, named as these flags without the dashes; flags and variables go before it
    /// [default: none]
    #[arg(long, value_name = "FILE", env = "NBD_SERVER_CONFIG")]
    config: Option<PathBuf>,

    /// Prefix of all object keys of this server's exports
    #[arg(long, value_name = "PREFIX", env = "NBD_SERVER_EXPORT_ROOT", default_value = "exports", value_parser = export_root)]
    export_root: ExportRoot,

    /// Where published snapshots live
    #[arg(long, value_name = "BACKEND", env = "NBD_SERVER_STORAGE_BACKEND", default_value = "local")]
    storage_backend: Backend,

    /// Directory of the local backend
    /// [default: /var/lib/nbd-server/store for root, else ~/.local/state/nbd-server/store]
    #[arg(long, value_name = "DIR", env = "NBD_SERVER_LOCAL_ROOT")]
    local_root: Option<PathBuf>,

    /// Bucket (azure: container); it must exist [default: none]
    #[arg(long, value_name = "NAME", env = "NBD_SERVER_BUCKET")]
    bucket: Option<String>,

    /// Address of an S3-compatible service, such as http://127.0.0.1:9000 [default: the provider's own]
    #[arg(long, value_name = "URL", env = "NBD_SERVER_ENDPOINT_URL")]
    endpoint_url: Option<String>,

    /// Region of the bucket [default: us-east-1, for r2: auto]
    #[arg(long, value_name = "NAME", env = "NBD_SERVER_REGION")]
    region: Option<String>,

    /// Account id that the r2 endpoint is derived from, unless --endpoint-url is given [default: none]
    #[arg(long, value_name = "ID", env = "NBD_SERVER_R2_ACCOUNT_ID")]
    r2_account_id: Option<String>,

    /// How long a read of missing data, or the start, waits for a store that does not answer
    #[arg(
        long,
        value_name = "SECONDS",
        env = "NBD_SERVER_STORE_TIMEOUT",
        default_value_t = 60,
        value_parser = clap::value_parser!(u64).range(1..=MAX_STORE_TIMEOUT_SECS)
    )]
    store_timeout: u64,

    /// DANGEROUS: start even if the store ignores conditional writes. Two servers that publish the same export then
    /// overwrite each other's images, and neither notices
    #[arg(long, value_name = "YES", env = "NBD_SERVER_ALLOW_UNSAFE_STORE", value_parser = BoolishValueParser::new(),
        action = ArgAction::Set, num_args = 0..=1, require_equals = true, default_value_t = false,
        default_missing_value = "true", hide_default_value = true)]
    allow_unsafe_store: bool,
}

/// The kinds of object storage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Backend {
    /// A local directory
    Local,
    /// Amazon S3 and compatible services
    S3,
    /// Cloudflare R2
    R2,
    /// Google Cloud Storage
    Gcs,
    /// Azure Blob Storage
    Azure,
    /// Memory, gone when the server stops: for trying out
    Memory,
}

impl Storage {
    /// The file whose settings lie under these flags.
    pub(crate) fn config(&self) -> Option<&Path> {
        self.config.as_deref()
    }

    /// Checks the flags against each other, and fills in the defaults.
    ///
    /// # Errors
    /// The first [`ConfigError`] found.
    pub fn check(&self, surroundings: &Surroundings<'_>) -> Result<StoreAccess, ConfigError> {
        Ok(StoreAccess {
            store: self.store(surroundings)?,
            export_root: self.export_root.clone(),
            timeout: Duration::from_secs(self.store_timeout),
            allow_unsafe: self.allow_unsafe_store,
        })
    }

    fn store(&self, surroundings: &Surroundings<'_>) -> Result<StoreConfig, ConfigError> {
        let backend = self.storage_backend;
        let (bucket, endpoint_url, region, account) = (
            given(self.bucket.as_ref()),
            given(self.endpoint_url.as_ref()),
            given(self.region.as_ref()),
            given(self.r2_account_id.as_ref()),
        );
        let local_root = self.local_root.as_ref().map(|root| root.display().to_string());
        let local = backend == Backend::Local;
        let remote = !local && backend != Backend::Memory;
        for (flag, value, fits, meant) in [
            ("--bucket", &bucket, remote, "s3, r2, gcs or azure"),
            ("--endpoint-url", &endpoint_url, remote, "s3, r2, gcs or azure"),
            ("--region", &region, matches!(backend, Backend::S3 | Backend::R2), "s3 or r2"),
            ("--r2-account-id", &account, backend == Backend::R2, "r2"),
            ("--local-root", &local_root, local, "local"),
        ] {
            if let (Some(value), false) = (value, fits) {
                return Err(ConfigError::Unused { flag, value: value.clone(), choice: backend.choice(), meant });
            }
        }
        let kind = match backend {
            Backend::Local => {
                let root = self.local_root.clone().map_or_else(|| surroundings.local_root(), Ok)?;
                return Ok(StoreConfig::Local(root));
            }
            Backend::Memory => return Ok(StoreConfig::Memory),
            Backend::S3 => RemoteKind::S3,
            Backend::R2 => RemoteKind::R2,
            Backend::Gcs => RemoteKind::Gcs,
            Backend::Azure => RemoteKind::Azure,
        };
        let missing = |flag, remedy| ConfigError::Missing { choice: backend.choice(), flag, remedy };
        if bucket.is_none() {
            return Err(missing("--bucket NAME", "name a bucket that exists"));
        }
        if backend == Backend::R2 && account.is_none() && endpoint_url.is_none() {
            return Err(missing("--r2-account-id ID", "it is on the R2 overview page; or give --endpoint-url URL"));
        }
        Ok(StoreConfig::Remote(RemoteConfig { kind, bucket, endpoint_url, region, r2_account_id: account }))
    }
}

/// An empty value is none: that is what an unset variable looks like in many service files.
pub(super) fn given(value: Option<&String>) -> Option<String> {
    value.filter(|text| !text.is_empty()).cloned()
}

impl Backend {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Local => "local",
            Self::S3 => "s3",
            Self::R2 => "r2",
            Self::Gcs => "gcs",
            Self::Azure => "azure",
            Self::Memory => "memory",
        }
    }

    /// As it was written.
    fn choice(self) -> String {
        format!("--storage-backend {}", self.as_str())
    }
}

fn export_root(text: &str) -> Result<ExportRoot, String> {
    let prefix: Key = text.parse().map_err(|e: crate::store::keys::KeyError| e.to_string())?;
    if text.len() > MAX_EXPORT_ROOT_BYTES {
        return Err(format!(
            "{} bytes leave no room for the rest of a key: use {MAX_EXPORT_ROOT_BYTES} at most",
            text.len()
        ));
    }
    Ok(ExportRoot::new(prefix))
}
