use super::*;

fn parse(args: &[&str]) -> Result<Box<Serve>, clap::Error> {
    let all = ["nbd-server", "serve"].iter().chain(args);
    Cli::try_parse_from(all).map(|cli| match cli.command {
        Command::Serve(serve) => serve,
        other => panic!("{other:?}"),
    })
}

fn with(variables: &[(&str, &str)], root: bool, args: &[&str]) -> Result<Config, ConfigError> {
    let variable = |name: &str| variables.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned());
    parse(args).unwrap().check(&Surroundings { root, variable: &variable, sockets_passed: false })
}

fn checked(args: &[&str]) -> Result<Config, ConfigError> {
    with(&[], true, args)
}

/// The text of a refusal by the argument parser, which must count as a usage error.
fn usage(args: &[&str]) -> String {
    let error = parse(args).map(drop).unwrap_err();
    assert_eq!(error.exit_code(), 2);
    error.to_string()
}

#[test]
fn no_flag_at_all_is_a_complete_configuration_for_root() {
    let config = checked(&[]).unwrap();
    let expected = Config {
        cache_root: "/var/lib/nbd-server/cache".into(),
        export_root: ExportRoot::new("exports".parse().unwrap()),
        listen: vec!["127.0.0.1:10809".parse().unwrap()],
        tls: None,
        admin_sock: "/run/nbd-server/nbd-server.sock".into(),
        admin_group: None,
        metrics_listen: None,
        chunk_bytes: 4 << 20,
        store: StoreConfig::Local("/var/lib/nbd-server/store".into()),
        store_timeout: Duration::from_secs(60),
        publish_bytes: 256 << 20,
        allow_unsafe_store: false,
        log_level: LogLevel::Info,
        log_format: LogFormat::Text,
    };
    assert_eq!(config, expected);
}

#[test]
fn a_user_gets_the_folders_of_the_xdg_specification() {
    let home = ("HOME", "/home/u");
    let paths = |variables: &[(&str, &str)]| {
        let config = with(variables, false, &[]).unwrap();
        let StoreConfig::Local(store) = config.store else { panic!("not local") };
        [config.cache_root, store, config.admin_sock].map(|path| path.display().to_string())
    };
    let state = "/home/u/.local/state/nbd-server";
    assert_eq!(
        paths(&[home]),
        [format!("{state}/cache"), format!("{state}/store"), format!("{state}/nbd-server.sock")]
    );
    assert_eq!(
        paths(&[home, ("XDG_STATE_HOME", "/s"), ("XDG_RUNTIME_DIR", "/run/user/7")]),
        ["/s/nbd-server/cache", "/s/nbd-server/store", "/run/user/7/nbd-server.sock"]
    );
    assert_eq!(paths(&[home, ("XDG_STATE_HOME", "relative")])[0], format!("{state}/cache"));
    let lost = with(&[], false, &[]).unwrap_err();
    assert!(matches!(lost, ConfigError::NoDefault { .. }), "{lost}");
    assert!(with(&[], false, &["--cache-root=/c", "--local-root=/l", "--admin-sock=/a"]).is_ok());
}

#[test]
fn a_chunk_size_is_bytes_or_has_a_binary_suffix() {
    for (text, bytes) in [("4096", 4096), ("64K", 65536), ("4M", 4 << 20), ("4MiB", 4 << 20), ("64mib", 64 << 20)] {
        assert_eq!(checked(&["--chunk-size", text]).unwrap().chunk_bytes, bytes);
    }
    for text in ["0", "-4096", "2048", "5000", "128MiB", "4MB", "4 M", "4.5M", "M", "", "99999999999999M", "1e6", "4Mü"]
    {
        let refused = usage(&[&format!("--chunk-size={text}")]);
        assert!(refused.contains(&format!("'{text}'")) && refused.contains("--chunk-size"), "{refused}");
    }
}

#[test]
fn a_listen_address_is_checked_and_may_be_given_several_times() {
    let config = checked(&["--listen", "[::1]:1", "--listen", "unix:/run/n.sock,127.0.0.1:0"]).unwrap();
    let shown: Vec<_> = config.listen.iter().map(ToString::to_string).collect();
    assert_eq!(shown, ["[::1]:1", "unix:/run/n.sock", "127.0.0.1:0"]);
    for text in ["", "10809", "localhost", "localhost:", ":10809", "127.0.0.1:65536", "::1:10809", "unix:"] {
        let refused = usage(&[&format!("--listen={text}")]);
        assert!(refused.contains("--listen") && refused.contains("unix:"), "{refused}");
    }
}

#[test]
fn an_export_root_is_a_key_with_room_behind_it() {
    assert!(checked(&["--export-root", "team-a/disks"]).is_ok());
    for text in ["", "/exports", "exports/", "a//b", "../x", "a\nb"] {
        assert!(usage(&[&format!("--export-root={text}")]).contains("--export-root"));
    }
    let longest = "r".repeat(MAX_EXPORT_ROOT_BYTES);
    let config = checked(&["--export-root", &longest]).unwrap();
    let keys = config.export_root.export(&"e".repeat(MAX_EXPORT_ID_BYTES).parse().unwrap());
    let id = crate::units::SnapshotId::generate();
    assert_eq!(keys.manifest(id).as_str().len(), MAX_KEY_BYTES, "the longest key just fits");
    assert!(usage(&["--export-root", &format!("{longest}r")]).contains("no room"));
}

#[test]
fn a_backend_needs_its_flags() {
    for backend in ["s3", "r2", "gcs", "azure"] {
        for bucket in [&[][..], &["--bucket="]] {
            let args = [&["--storage-backend", backend], bucket].concat();
            let refused = checked(&args).unwrap_err().to_string();
            assert!(refused.contains(backend) && refused.contains("--bucket"), "{refused}");
        }
    }
    let r2 = ["--storage-backend=r2", "--bucket=b"];
    let refused = checked(&r2).unwrap_err().to_string();
    assert!(refused.contains("--r2-account-id") && refused.contains("--endpoint-url"), "{refused}");
    for extra in ["--r2-account-id=abc", "--endpoint-url=http://127.0.0.1:1"] {
        assert!(checked(&[&r2[..], &[extra]].concat()).is_ok());
    }
    assert!(usage(&["--storage-backend=floppy"]).contains("local, s3, r2, gcs, azure, memory"));
}

#[test]
fn a_flag_that_would_be_ignored_is_refused() {
    for args in [
        &["--bucket=b"][..],
        &["--endpoint-url=http://x"],
        &["--region=eu"],
        &["--storage-backend=memory", "--local-root=/l"],
        &["--storage-backend=s3", "--bucket=b", "--r2-account-id=a"],
        &["--storage-backend=gcs", "--bucket=b", "--region=eu"],
    ] {
        let refused = checked(args).unwrap_err();
        assert!(matches!(refused, ConfigError::Unused { .. }), "{refused}");
        let (flag, value) = args[args.len() - 1].split_once('=').unwrap();
        assert!(refused.to_string().contains(&format!("{flag} {value}")), "{refused}");
    }
    assert!(checked(&["--bucket=", "--region="]).is_ok(), "empty counts as not given");
}

#[test]
fn what_cannot_work_together_is_refused() {
    let long = format!("/{}", "s".repeat(MAX_PATH_BYTES));
    let refused = checked(&["--admin-sock", &long]).unwrap_err().to_string();
    assert!(refused.contains(&long) && refused.contains("107"), "{refused}");
    let same = checked(&["--cache-root=/d", "--local-root=/d/"]).unwrap_err();
    assert!(matches!(same, ConfigError::SameDirectory(_)), "{same}");
    for timeout in ["0", "-1", "x", "86401"] {
        assert!(usage(&[&format!("--store-timeout={timeout}")]).contains("--store-timeout"));
    }
}

#[test]
fn help_gives_every_flag_a_default_and_its_variable() {
    let error = parse(&["--help"]).map(drop).unwrap_err();
    let help = error.to_string();
    for flag in [
        "cache-root",
        "export-root",
        "listen",
        "admin-sock",
        "chunk-size",
        "publish-memory",
        "storage-backend",
        "local-root",
        "bucket",
        "endpoint-url",
        "region",
        "r2-account-id",
        "store-timeout",
        "log-level",
    ] {
        let start = help.find(&format!("--{flag} <")).unwrap_or_else(|| panic!("--{flag} in {help}"));
        let rest = &help[start..];
        let entry = &rest[..rest[2..].find("\n      --").or(rest.find("-h, --help")).unwrap()];
        let variable = format!("NBD_SERVER_{}", flag.replace('-', "_").to_ascii_uppercase());
        assert!(entry.contains(&variable), "{variable} in {entry}");
        assert!(entry.contains("[default: "), "{entry}");
    }
}

#[test]
fn the_command_line_is_well_formed() {
    use clap::CommandFactory;
    Cli::command().debug_assert();
}

#[test]
fn tls_is_off_or_has_a_certificate_and_its_key() {
    let pair = ["--tls-cert=/c.pem", "--tls-key=/k.pem"];
    let with = |mode, more: &[&str]| checked(&[&[mode][..], &pair, more].concat()).unwrap().tls.unwrap();
    let expected = TlsConfig { required: false, cert: "/c.pem".into(), key: "/k.pem".into(), client_ca: None };
    assert_eq!(with("--tls=on", &[]), expected);
    assert_eq!(with("--tls=required", &[]), TlsConfig { required: true, ..expected.clone() });
    assert_eq!(with("--tls=on", &["--tls-client-ca=/a.pem"]).client_ca, Some("/a.pem".into()));
    assert_eq!(checked(&["--tls=off"]).unwrap().tls, None);
    for (args, parts) in [
        (&["--tls=on"][..], ["--tls on", "--tls-cert FILE"]),
        (&["--tls=required", "--tls-cert=/c.pem"], ["--tls required", "--tls-key FILE"]),
        (&["--tls=required", "--tls-key=/k.pem"], ["--tls required", "--tls-cert FILE"]),
        (&["--tls-cert=/c.pem"], ["--tls-cert /c.pem", "--tls off"]),
        (&["--tls-key=/k.pem"], ["--tls-key /k.pem", "--tls off"]),
        (&["--tls=off", "--tls-client-ca=/a.pem"], ["--tls-client-ca /a.pem", "--tls off"]),
    ] {
        let text = checked(args).unwrap_err().to_string();
        parts.iter().for_each(|part| assert!(text.contains(part), "{part:?} is not in {text}"));
    }
    assert!(usage(&["--tls=maybe"]).contains("off, on, required"));
}

#[test]
fn passed_sockets_replace_the_default_address_and_join_those_that_are_given() {
    let listen = |args: &[&str]| {
        let surroundings = Surroundings { root: true, variable: &|_| None, sockets_passed: true };
        parse(args).unwrap().check(&surroundings).unwrap().listen
    };
    assert_eq!(listen(&[]), []);
    assert_eq!(listen(&["--listen=127.0.0.1:7"]), ["127.0.0.1:7".parse().unwrap()]);
}
