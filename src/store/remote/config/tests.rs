use super::*;
use crate::clock::SystemClock;

const KEYS: &[(&str, &str)] = &[("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE"), ("AWS_SECRET_ACCESS_KEY", "hushhush")];

fn config(kind: RemoteKind) -> RemoteConfig {
    let r2_account_id = (kind == RemoteKind::R2).then(|| "0123456789abcdef0123456789abcdef".to_owned());
    RemoteConfig { kind, bucket: Some("disks".into()), endpoint_url: None, region: None, r2_account_id }
}

fn connect(config: &RemoteConfig, environment: &[(&str, &str)]) -> Result<RemoteStore, RemoteConfigError> {
    let look_up = |name: &str| environment.iter().find(|(n, _)| *n == name).map(|(_, value)| (*value).to_owned());
    RemoteStore::connect(config, &look_up, RetryPolicy::default(), Arc::new(SystemClock))
}

fn refusal(config: &RemoteConfig, environment: &[(&str, &str)]) -> String {
    connect(config, environment).unwrap_err().to_string()
}

#[test]
fn a_client_for_https_can_be_made_for_every_service() {
    let azure_key = "aGVsbG8=";
    let environments: [(RemoteKind, &[(&str, &str)]); 4] = [
        (RemoteKind::S3, KEYS),
        (RemoteKind::R2, KEYS),
        (RemoteKind::Gcs, &[("GOOGLE_BEARER_TOKEN", "hushhush")]),
        (RemoteKind::Azure, &[("AZURE_STORAGE_ACCOUNT_NAME", "account"), ("AZURE_STORAGE_ACCOUNT_KEY", azure_key)]),
    ];
    for (kind, environment) in environments {
        let store = connect(&config(kind), environment).unwrap();
        let text = format!("{store:?} {store}");
        assert!(text.contains("disks"), "{text}");
        for secret in ["hushhush", "AKIDEXAMPLE", azure_key] {
            assert!(!text.contains(secret), "{text}");
        }
    }
}

#[test]
fn r2_derives_its_endpoint_from_the_account_unless_one_is_given() {
    let mut r2 = config(RemoteKind::R2);
    let derived = "r2 bucket disks at https://0123456789abcdef0123456789abcdef.r2.cloudflarestorage.com";
    assert_eq!(connect(&r2, KEYS).unwrap().to_string(), derived);
    r2.r2_account_id = None;
    assert!(refusal(&r2, KEYS).contains("--r2-account-id"));
    r2.endpoint_url = Some("http://127.0.0.1:5000/".into());
    assert_eq!(connect(&r2, KEYS).unwrap().to_string(), "r2 bucket disks at http://127.0.0.1:5000");
    r2 = config(RemoteKind::R2);
    r2.r2_account_id = Some("evil.example/x".into());
    assert!(refusal(&r2, KEYS).contains("evil.example/x"));
}

#[test]
fn a_missing_bucket_is_named_with_its_remedy() {
    for kind in [RemoteKind::S3, RemoteKind::R2, RemoteKind::Gcs, RemoteKind::Azure] {
        for bucket in [None, Some(String::new())] {
            let text = refusal(&RemoteConfig { bucket, ..config(kind) }, KEYS);
            assert!(text.contains(kind.name()) && text.contains("--bucket NAME"), "{text}");
        }
    }
}

#[test]
fn a_bucket_that_is_a_url_or_a_path_is_refused_by_name() {
    for bucket in ["s3://disks", "disks/team", "disks?x", "di sks"] {
        let text = refusal(&RemoteConfig { bucket: Some(bucket.into()), ..config(RemoteKind::S3) }, KEYS);
        assert!(text.contains(bucket) && text.contains("--bucket"), "{text}");
    }
}

#[test]
fn missing_credentials_fail_at_once_and_name_the_variables() {
    for (kind, environment, named) in [
        (RemoteKind::S3, &[][..], "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
        (RemoteKind::S3, &KEYS[..1], "AWS_SECRET_ACCESS_KEY beside"),
        (RemoteKind::S3, &KEYS[1..], "AWS_ACCESS_KEY_ID beside"),
        (RemoteKind::S3, &[("AWS_ACCESS_KEY_ID", ""), ("AWS_SECRET_ACCESS_KEY", "")], "AWS_ACCESS_KEY_ID and"),
        (RemoteKind::R2, &[], "R2 API token"),
        (RemoteKind::Gcs, &[("HOME", "/nonexistent")], "GOOGLE_APPLICATION_CREDENTIALS"),
        (RemoteKind::Azure, &[], "AZURE_STORAGE_ACCOUNT_NAME"),
        (RemoteKind::Azure, &[("AZURE_STORAGE_ACCOUNT_NAME", "a")], "AZURE_STORAGE_ACCOUNT_KEY"),
    ] {
        let text = refusal(&config(kind), environment);
        assert!(text.contains(named) && !text.contains("hushhush"), "{kind:?}: {text}");
    }
}

#[test]
fn other_sources_of_credentials_are_accepted() {
    for variable in AWS_OTHER_SOURCES {
        let value = match *variable {
            "AWS_SKIP_SIGNATURE" => "true",
            "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI" => "/v2/credentials",
            _ => "http://169.254.169.254",
        };
        connect(&config(RemoteKind::S3), &[(variable, value)]).unwrap();
    }
}

#[test]
fn every_variable_that_is_passed_on_is_known_to_the_client_library() {
    let everything = |_: &str| Some("x".to_owned());
    let environment = Environment(&everything);
    let aws: Vec<(object_store::aws::AmazonS3ConfigKey, _)> = environment.settings(AWS_VARIABLES);
    let google: Vec<(object_store::gcp::GoogleConfigKey, _)> = environment.settings(GOOGLE_VARIABLES);
    let azure: Vec<(object_store::azure::AzureConfigKey, _)> = environment.settings(AZURE_VARIABLES);
    let known = [aws.len(), google.len(), azure.len()];
    assert_eq!(known, [AWS_VARIABLES.len(), GOOGLE_VARIABLES.len(), AZURE_VARIABLES.len()]);
}

#[test]
fn an_endpoint_that_is_no_plain_url_is_refused_and_a_password_in_it_not_repeated() {
    for url in ["ftp://host", "host:9000", "https://", "https:///bucket", "http://ho st", "https://host?x=1"] {
        let text = refusal(&RemoteConfig { endpoint_url: Some(url.into()), ..config(RemoteKind::S3) }, KEYS);
        assert!(text.contains(url) && text.contains("--endpoint-url"), "{text}");
    }
    let endpoint_url = Some("https://user:hushhush@host".to_owned());
    let text = refusal(&RemoteConfig { endpoint_url, ..config(RemoteKind::S3) }, KEYS);
    assert!(!text.contains("hushhush") && text.contains("--endpoint-url"), "{text}");
}

#[test]
fn a_variable_that_the_client_library_would_panic_on_is_refused_by_name_with_a_remedy() {
    let empty = tempfile::NamedTempFile::new().unwrap();
    let empty = empty.path().to_str().unwrap();
    let azure = ("AZURE_STORAGE_ACCOUNT_NAME", "account");
    for (kind, environment) in [
        (RemoteKind::S3, &[("AWS_METADATA_ENDPOINT", "169.254.169.254")][..]),
        (RemoteKind::S3, &[("AWS_METADATA_ENDPOINT", "http:// host")]),
        (RemoteKind::S3, &[("AWS_CONTAINER_CREDENTIALS_FULL_URI", "localhost/x")]),
        (RemoteKind::S3, &[("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "no slash")]),
        (RemoteKind::S3, &[("AWS_ENDPOINT_URL_STS", "http://sts.example")]),
        (RemoteKind::S3, &[("AWS_SESSION_TOKEN", "caf\u{e9}")]),
        (RemoteKind::S3, &[("AWS_WEB_IDENTITY_TOKEN_FILE", "/nonexistent"), ("AWS_ROLE_ARN", "arn")]),
        (RemoteKind::S3, &[("AWS_WEB_IDENTITY_TOKEN_FILE", empty), ("AWS_ROLE_ARN", "arn")]),
        (RemoteKind::Gcs, &[("GCE_METADATA_HOST", "a b")]),
        (RemoteKind::Azure, &[("AZURE_MSI_ENDPOINT", "169.254.169.254"), azure]),
        (RemoteKind::Azure, &[("AZURE_TENANT_ID", "a b"), azure]),
        (RemoteKind::Azure, &[("AZURE_AUTHORITY_HOST", "login"), azure]),
        (RemoteKind::Azure, &[("AZURE_FEDERATED_TOKEN_FILE", "/nonexistent"), ("AZURE_CLIENT_ID", "x"), azure]),
    ] {
        let text = refusal(&config(kind), environment);
        assert!(text.contains(environment[0].0) && !text.contains("caf"), "{environment:?}: {text}");
    }
    // Left over beside a pair of keys, it is not used.
    connect(
        &config(RemoteKind::S3),
        &[KEYS, &[("AWS_WEB_IDENTITY_TOKEN_FILE", "/nonexistent"), ("AWS_ROLE_ARN", "arn")]].concat(),
    )
    .unwrap();
}
