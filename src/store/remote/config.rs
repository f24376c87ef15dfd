//! From what the user wrote, and the credentials in the environment, to a connected store.
//!
//! Of the environment only the variables named in this file are used: one that changes how the store works (a timeout,
//! conditional writes switched off) cannot slip in. No request is made here; the probe at start makes the first.

use std::path::Path;
use std::sync::Arc;

use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::list::PaginatedListStore;
use object_store::multipart::MultipartStore;
use object_store::{ClientOptions, ObjectStore, RetryConfig};

use super::http::Connector;
use super::token::{Copy, Trimmed, read_token, trimmed};
use super::upload::Discards;
use super::{RemoteStore, VersionTag};
use crate::clock::Clock;
use crate::store::BoxError;
use crate::store::health::Health;
use crate::store::retry::RetryPolicy;

/// Which service holds the bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RemoteKind {
    /// Amazon S3, and what speaks its protocol.
    S3,
    /// Cloudflare R2.
    R2,
    /// Google Cloud Storage.
    Gcs,
    /// Azure Blob Storage; the bucket is a container.
    Azure,
}

impl RemoteKind {
    fn name(self) -> &'static str {
        match self {
            Self::S3 => "s3",
            Self::R2 => "r2",
            Self::Gcs => "gcs",
            Self::Azure => "azure",
        }
    }
}

/// Where the bucket is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RemoteConfig {
    /// The service.
    pub kind: RemoteKind,
    /// The bucket; there is no default.
    pub bucket: Option<String>,
    /// The service's address, if it is not the usual one.
    pub endpoint_url: Option<String>,
    /// The region: `us-east-1` for S3 and `auto` for R2 unless given; without meaning elsewhere.
    pub region: Option<String>,
    /// R2 only: what its endpoint is derived from.
    pub r2_account_id: Option<String>,
}

/// Why there is no store. Each text names the value and the remedy, and none repeats a credential.
#[derive(Debug, thiserror::Error)]
pub enum RemoteConfigError {
    /// A value that is needed is not there.
    #[error("--storage-backend {backend} needs {what}: {remedy}")]
    Missing {
        /// The kind of store.
        backend: &'static str,
        /// The value, in words.
        what: &'static str,
        /// How to give it.
        remedy: &'static str,
    },
    /// A value cannot be what it should be.
    #[error("{flag} {value:?} {reason}")]
    Invalid {
        /// The flag it came by.
        flag: &'static str,
        /// The value as given.
        value: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A variable of the environment cannot be what it is for; its value is not shown, since it may be a credential.
    #[error("{variable} {reason}")]
    Variable {
        /// Its name.
        variable: &'static str,
        /// What is wrong with its value, and the remedy.
        reason: &'static str,
    },
    /// The file that a variable names cannot be read, or cannot be a token; its content is not shown.
    #[error("the file {path} of {variable} cannot be read as a token: {reason}; name the token's file there")]
    TokenFile {
        /// The variable's name.
        variable: &'static str,
        /// The variable's value.
        path: String,
        /// What is wrong.
        reason: String,
    },
    /// The client could not be made of these values.
    #[error("cannot connect to the {backend} store: {source}")]
    Rejected {
        /// The kind of store.
        backend: &'static str,
        /// What the client library said.
        source: BoxError,
    },
}

/// What of the AWS environment is passed on.
const AWS_VARIABLES: &[&str] = &[
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_ROLE_ARN",
    "AWS_ROLE_SESSION_NAME",
    "AWS_ENDPOINT_URL_STS",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE",
    "AWS_METADATA_ENDPOINT",
    "AWS_SKIP_SIGNATURE",
    "AWS_SERVER_SIDE_ENCRYPTION",
    "AWS_SSE_KMS_KEY_ID",
    "AWS_SSE_BUCKET_KEY_ENABLED",
];
/// Any of these says that credentials come from somewhere else than a pair of keys.
const AWS_OTHER_SOURCES: &[&str] = &[
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_METADATA_ENDPOINT",
    "AWS_SKIP_SIGNATURE",
];
const AWS_REMEDY: &str = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (profile files are not read); on an instance \
     with a role set AWS_METADATA_ENDPOINT=http://169.254.169.254 instead; AWS_SKIP_SIGNATURE=true sends no credentials";
const R2_REMEDY: &str = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY to those of an R2 API token";

const GOOGLE_VARIABLES: &[&str] = &[
    "GOOGLE_SERVICE_ACCOUNT",
    "GOOGLE_SERVICE_ACCOUNT_PATH",
    "GOOGLE_SERVICE_ACCOUNT_KEY",
    "GOOGLE_APPLICATION_CREDENTIALS",
    "GOOGLE_BEARER_TOKEN",
    "GOOGLE_SKIP_SIGNATURE",
];
/// Where `gcloud auth application-default login` leaves its credentials, below the home directory.
const GOOGLE_DEFAULT_FILE: &str = ".config/gcloud/application_default_credentials.json";
const GOOGLE_REMEDY: &str = "set GOOGLE_APPLICATION_CREDENTIALS (or GOOGLE_SERVICE_ACCOUNT) to a credentials file; on \
     an instance with a service account set GCE_METADATA_HOST=metadata.google.internal instead";

const AZURE_VARIABLES: &[&str] = &[
    "AZURE_STORAGE_ACCOUNT_NAME",
    "AZURE_STORAGE_ACCOUNT_KEY",
    "AZURE_STORAGE_ACCESS_KEY",
    "AZURE_STORAGE_SAS_TOKEN",
    "AZURE_STORAGE_SAS_KEY",
    "AZURE_STORAGE_TOKEN",
    "AZURE_STORAGE_USE_EMULATOR",
    "AZURE_CLIENT_ID",
    "AZURE_CLIENT_SECRET",
    "AZURE_TENANT_ID",
    "AZURE_AUTHORITY_HOST",
    "AZURE_FEDERATED_TOKEN_FILE",
    "AZURE_USE_AZURE_CLI",
    "AZURE_MSI_ENDPOINT",
    "AZURE_SKIP_SIGNATURE",
];
const AZURE_SOURCES: &[&str] = &[
    "AZURE_STORAGE_ACCOUNT_KEY",
    "AZURE_STORAGE_ACCESS_KEY",
    "AZURE_STORAGE_SAS_TOKEN",
    "AZURE_STORAGE_SAS_KEY",
    "AZURE_STORAGE_TOKEN",
    "AZURE_STORAGE_USE_EMULATOR",
    "AZURE_CLIENT_SECRET",
    "AZURE_FEDERATED_TOKEN_FILE",
    "AZURE_USE_AZURE_CLI",
    "AZURE_MSI_ENDPOINT",
    "AZURE_SKIP_SIGNATURE",
];
const AZURE_REMEDY: &str = "set AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN; with a managed identity set \
     AZURE_MSI_ENDPOINT=http://169.254.169.254/metadata/identity/oauth2/token instead";

/// What is asked for credentials, by whole URL.
const URL_VARIABLES: &[&str] = &[
    "AWS_ENDPOINT_URL_STS",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_METADATA_ENDPOINT",
    "AZURE_AUTHORITY_HOST",
    "AZURE_MSI_ENDPOINT",
    "AZURITE_BLOB_STORAGE_URL",
];
/// What becomes part of a URL, such as a host.
const URL_PARTS: &[&str] =
    &["AZURE_STORAGE_ACCOUNT_NAME", "AZURE_TENANT_ID", "GCE_METADATA_HOST", "GCE_METADATA_ROOT", "GCE_METADATA_IP"];
/// Files that hold a token, read again whenever credentials are renewed; what each is used with, and what takes its place.
const TOKEN_FILES: &[(&str, &str, &[&str])] = &[
    ("AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_ROLE_ARN", &["AWS_ACCESS_KEY_ID"]),
    ("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_FULL_URI", &["AWS_ACCESS_KEY_ID"]),
    (
        "AZURE_FEDERATED_TOKEN_FILE",
        "AZURE_CLIENT_ID",
        &["AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_ACCESS_KEY", "AZURE_STORAGE_TOKEN"],
    ),
];
/// What the client library looks up by itself.
const GOOGLE_OWN_VARIABLES: &[&str] = &["GCE_METADATA_HOST", "GCE_METADATA_ROOT", "GCE_METADATA_IP"];
const AZURE_OWN_VARIABLES: &[&str] = &["AZURITE_BLOB_STORAGE_URL"];

/// The environment, as something to look names up in; an empty value counts as none.
struct Environment<'a>(&'a dyn Fn(&str) -> Option<String>);

impl Environment<'_> {
    fn get(&self, name: &str) -> Option<String> {
        (self.0)(name).filter(|value| !value.is_empty())
    }

    fn has_any(&self, names: &[&str]) -> bool {
        names.iter().any(|name| self.get(name).is_some())
    }

    /// Refuses what no header, URL or token file can be: the client library would panic, some of it long after the start.
    fn check(&self, names: &[&'static str]) -> Result<(), RemoteConfigError> {
        let fine = |value: &str| value.bytes().all(|c| matches!(c, b' '..=b'~'));
        for &variable in names {
            let Some(value) = self.get(variable) else { continue };
            let refuse = |reason| Err(RemoteConfigError::Variable { variable, reason });
            // A whole file as a value.
            let text = variable == "GOOGLE_SERVICE_ACCOUNT_KEY" || variable.ends_with("_FILE");
            if !text && value.contains(char::is_control) {
                return refuse(
                    "holds a line break or another control character: set it without, as of a file that ends in one",
                );
            }
            if !text && !is_path(variable) && !fine(&value) {
                return refuse("holds a character that no request can carry: use letters, digits and signs of ASCII");
            }
            if URL_VARIABLES.contains(&variable) && !is_url(&value) {
                return refuse("is not a URL: give scheme and host, as in http://169.254.169.254");
            }
            if variable == "AWS_ENDPOINT_URL_STS" && !value.starts_with("https://") {
                return refuse("does not start with https://, by which alone a token is sent");
            }
            let below = value.starts_with('/') && is_url(&format!("http://host{value}"));
            if variable == "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI" && !below {
                return refuse("is not the path of a URL: it starts with / and has no spaces");
            }
            if URL_PARTS.contains(&variable) && !is_url(&format!("http://{value}/")) {
                return refuse("cannot be part of a URL: it has spaces or other characters that no name of a host has");
            }
            if self.uses_token_file(variable) {
                read_token(&value).map_err(|reason| RemoteConfigError::TokenFile { variable, path: value, reason })?;
            }
        }
        Ok(())
    }

    /// Whether a variable names a token file that credentials are made of.
    fn uses_token_file(&self, variable: &str) -> bool {
        let row = TOKEN_FILES.iter().find(|(name, ..)| *name == variable);
        row.is_some_and(|(_, with, instead)| self.has_any(&[with]) && !self.has_any(instead))
    }

    /// The value of a setting for the client library: of a token file, the path of a copy.
    fn sent(&self, key: &str, value: String, copies: &mut Vec<Copy>) -> object_store::Result<String> {
        if self.uses_token_file(&key.to_ascii_uppercase()) { trimmed(value, copies) } else { Ok(value) }
    }

    /// The variables that are set, under the names the client library knows.
    fn settings<K: std::str::FromStr>(&self, names: &[&str]) -> Vec<(K, String)> {
        let known = |name: &&str| Some((name.to_ascii_lowercase().parse().ok()?, self.get(name)?));
        names.iter().filter_map(known).collect()
    }
}

/// The crate's own retries would repeat conditional puts.
fn no_retries() -> RetryConfig {
    RetryConfig { max_retries: 0, ..RetryConfig::default() }
}

impl RemoteStore {
    /// Connects to a bucket. Credentials are looked up with `environment`, which is `|name| std::env::var(name).ok()`
    /// outside of tests.
    ///
    /// # Errors
    /// [`RemoteConfigError`] names the value that is missing or wrong.
    pub fn connect(
        config: &RemoteConfig,
        environment: &dyn Fn(&str) -> Option<String>,
        policy: RetryPolicy,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, RemoteConfigError> {
        // The HTTP client is built without a default for TLS. An error means that one is installed already.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let environment = Environment(environment);
        let bucket = config.bucket()?;
        let endpoint = config.endpoint()?;
        let at = endpoint.as_deref().map(|url| format!(" at {url}")).unwrap_or_default();
        let place = format!("{} bucket {bucket}{at}", config.kind.name());
        let plain = endpoint.as_deref().is_some_and(|url| url.starts_with("http://"));
        let options = ClientOptions::new().with_allow_http(plain);
        let (passed_on, looked_up): (_, &[&str]) = match config.kind {
            RemoteKind::S3 | RemoteKind::R2 => (AWS_VARIABLES, &[]),
            RemoteKind::Gcs => (GOOGLE_VARIABLES, GOOGLE_OWN_VARIABLES),
            RemoteKind::Azure => (AZURE_VARIABLES, AZURE_OWN_VARIABLES),
        };
        environment.check(passed_on)?;
        environment.check(looked_up)?;
        match config.kind {
            RemoteKind::S3 | RemoteKind::R2 => {
                let store = config.aws(&environment, options, bucket, endpoint)?;
                Ok(Self::over(store, VersionTag::ETag, place, policy, clock))
            }
            RemoteKind::Gcs => {
                let store = config.google(&environment, options, bucket, endpoint)?;
                Ok(Self::over(store, VersionTag::Generation, place, policy, clock))
            }
            RemoteKind::Azure => {
                let store = config.azure(&environment, options, bucket, endpoint)?;
                Ok(Self::over(store, VersionTag::ETag, place, policy, clock))
            }
        }
    }

    fn over<S>(store: S, tag: VersionTag, place: String, policy: RetryPolicy, clock: Arc<dyn Clock>) -> Self
    where
        S: ObjectStore + MultipartStore + PaginatedListStore,
    {
        let store = Arc::new(store);
        let health = Arc::new(Health::new(clock.now()));
        Self {
            objects: store.clone(),
            parts: store.clone(),
            pages: store,
            tag,
            keeps_payloads: false,
            discards: Discards::default(),
            place,
            policy,
            clock,
            health,
        }
    }
}

impl RemoteConfig {
    fn missing(&self, what: &'static str, remedy: &'static str) -> RemoteConfigError {
        RemoteConfigError::Missing { backend: self.kind.name(), what, remedy }
    }

    fn rejected(&self, source: object_store::Error) -> RemoteConfigError {
        RemoteConfigError::Rejected { backend: self.kind.name(), source: source.into() }
    }

    fn bucket(&self) -> Result<&str, RemoteConfigError> {
        let bucket = self.bucket.as_deref().filter(|bucket| !bucket.is_empty());
        let bucket = bucket.ok_or_else(|| self.missing("a bucket", "name an existing one with --bucket NAME"))?;
        let allowed = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'.' | b'_' | b'-');
        if bucket.bytes().all(allowed) {
            Ok(bucket)
        } else {
            let reason = "is not the name of a bucket: use letters, digits, and . _ - (no URL and no prefix)";
            Err(RemoteConfigError::Invalid { flag: "--bucket", value: bucket.into(), reason })
        }
    }

    /// The address to talk to, if it is not the client library's own choice.
    fn endpoint(&self) -> Result<Option<String>, RemoteConfigError> {
        if let Some(url) = self.endpoint_url.as_deref().filter(|url| !url.is_empty()) {
            return check_endpoint(url).map(Some);
        }
        if self.kind != RemoteKind::R2 {
            return Ok(None);
        }
        let account = self.r2_account_id.as_deref().filter(|id| !id.is_empty()).ok_or_else(|| {
            self.missing("an account", "give --r2-account-id ID (the R2 overview page shows it), or --endpoint-url URL")
        })?;
        if account.bytes().all(|c| c.is_ascii_alphanumeric() || c == b'.') {
            Ok(Some(format!("https://{account}.r2.cloudflarestorage.com")))
        } else {
            let reason = "is not an account id: 32 hex digits, perhaps with a jurisdiction as in ID.eu";
            Err(RemoteConfigError::Invalid { flag: "--r2-account-id", value: account.into(), reason })
        }
    }

    fn aws(
        &self,
        environment: &Environment<'_>,
        options: ClientOptions,
        bucket: &str,
        endpoint: Option<String>,
    ) -> Result<object_store::aws::AmazonS3, RemoteConfigError> {
        let (region, remedy) = match self.kind {
            RemoteKind::R2 => ("auto", R2_REMEDY),
            _ => ("us-east-1", AWS_REMEDY),
        };
        let id = environment.get("AWS_ACCESS_KEY_ID").is_some();
        let secret = environment.get("AWS_SECRET_ACCESS_KEY").is_some();
        match (id, secret) {
            (true, true) => {}
            (true, false) => return Err(self.missing("AWS_SECRET_ACCESS_KEY beside AWS_ACCESS_KEY_ID", remedy)),
            (false, true) => return Err(self.missing("AWS_ACCESS_KEY_ID beside AWS_SECRET_ACCESS_KEY", remedy)),
            (false, false) if environment.has_any(AWS_OTHER_SOURCES) => {}
            // The client library would ask the metadata service of an instance that this may not be.
            (false, false) => return Err(self.missing("credentials", remedy)),
        }
        let mut builder = AmazonS3Builder::new()
            .with_bucket_name(bucket)
            .with_region(self.region.as_deref().filter(|region| !region.is_empty()).unwrap_or(region))
            .with_virtual_hosted_style_request(false)
            // One key at a time is all we delete, and plain DELETE is what every S3 speaks.
            .with_config(AmazonS3ConfigKey::DisableBulkDelete, "true")
            .with_retry(no_retries())
            .with_client_options(options)
            .with_http_connector(Connector);
        if let Some(endpoint) = endpoint {
            builder = builder.with_endpoint(endpoint);
        }
        let mut copies = Vec::new();
        for (key, value) in environment.settings::<AmazonS3ConfigKey>(AWS_VARIABLES) {
            let value = environment.sent(key.as_ref(), value, &mut copies).map_err(|e| self.rejected(e))?;
            builder = builder.with_config(key, value);
        }
        let store = builder.clone().build().map_err(|e| self.rejected(e))?;
        if copies.is_empty() {
            return Ok(store);
        }
        let provider = Arc::new(Trimmed::new(Arc::clone(store.credentials()), copies));
        builder.with_credentials(provider).build().map_err(|e| self.rejected(e))
    }

    fn google(
        &self,
        environment: &Environment<'_>,
        options: ClientOptions,
        bucket: &str,
        endpoint: Option<String>,
    ) -> Result<object_store::gcp::GoogleCloudStorage, RemoteConfigError> {
        let logged_in = environment.get("HOME").is_some_and(|home| Path::new(&home).join(GOOGLE_DEFAULT_FILE).exists());
        if !logged_in && !environment.has_any(GOOGLE_VARIABLES) && !environment.has_any(&["GCE_METADATA_HOST"]) {
            return Err(self.missing("credentials", GOOGLE_REMEDY));
        }
        let mut builder = GoogleCloudStorageBuilder::new()
            .with_bucket_name(bucket)
            .with_retry(no_retries())
            .with_client_options(options)
            .with_http_connector(Connector);
        if let Some(endpoint) = endpoint {
            builder = builder.with_base_url(&endpoint);
        }
        for (key, value) in environment.settings(GOOGLE_VARIABLES) {
            builder = builder.with_config(key, value);
        }
        builder.build().map_err(|e| self.rejected(e))
    }

    fn azure(
        &self,
        environment: &Environment<'_>,
        options: ClientOptions,
        container: &str,
        endpoint: Option<String>,
    ) -> Result<object_store::azure::MicrosoftAzure, RemoteConfigError> {
        if !environment.has_any(&["AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_USE_EMULATOR"]) {
            return Err(self.missing("a storage account", "set AZURE_STORAGE_ACCOUNT_NAME"));
        }
        if !environment.has_any(AZURE_SOURCES) {
            return Err(self.missing("credentials", AZURE_REMEDY));
        }
        let mut builder = MicrosoftAzureBuilder::new()
            .with_container_name(container)
            .with_retry(no_retries())
            .with_client_options(options)
            .with_http_connector(Connector);
        if let Some(endpoint) = endpoint {
            builder = builder.with_endpoint(endpoint);
        }
        let mut copies = Vec::new();
        for (key, value) in environment.settings::<AzureConfigKey>(AZURE_VARIABLES) {
            let value = environment.sent(key.as_ref(), value, &mut copies).map_err(|e| self.rejected(e))?;
            builder = builder.with_config(key, value);
        }
        let store = builder.clone().build().map_err(|e| self.rejected(e))?;
        if copies.is_empty() {
            return Ok(store);
        }
        let provider = Arc::new(Trimmed::new(Arc::clone(store.credentials()), copies));
        builder.with_credentials(provider).build().map_err(|e| self.rejected(e))
    }
}

/// Whether a value is the path of a file, which is sent nowhere.
fn is_path(variable: &str) -> bool {
    matches!(variable, "GOOGLE_SERVICE_ACCOUNT" | "GOOGLE_SERVICE_ACCOUNT_PATH" | "GOOGLE_APPLICATION_CREDENTIALS")
}

/// Whether both the client library and its HTTP client take a text for the URL of a host.
fn is_url(text: &str) -> bool {
    let uri: Option<hyper::Uri> = text.parse().ok();
    (text.starts_with("http://") || text.starts_with("https://"))
        && uri.is_some_and(|uri| uri.host().is_some_and(|host| !host.is_empty()))
        && reqwest::Url::parse(text).is_ok()
}

/// The URL of a service: scheme, host and port, perhaps a path; without the slash at its end.
fn check_endpoint(url: &str) -> Result<String, RemoteConfigError> {
    let refuse = |value: &str, reason| {
        Err(RemoteConfigError::Invalid { flag: "--endpoint-url", value: value.to_owned(), reason })
    };
    if url.contains('@') {
        // Not shown: what stands before the @ may be a password.
        return refuse("…@…", "carries a user name; credentials come from the environment");
    }
    let Some(rest) = url.strip_prefix("https://").or_else(|| url.strip_prefix("http://")) else {
        return refuse(url, "does not start with https:// or http://");
    };
    if rest.starts_with('/') || rest.is_empty() || !rest.bytes().all(|c| c.is_ascii_graphic()) {
        return refuse(url, "has no host, or characters that no URL has");
    }
    if rest.contains(['?', '#']) {
        return refuse(url, "has a query or a fragment; give scheme, host and port only");
    }
    Ok(url.trim_end_matches('/').to_owned())
}

#[cfg(test)]
mod tests;
