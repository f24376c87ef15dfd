//! Certificates for the tests, made by `openssl` on the spot.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use nbd_server::nbd::tls::TlsConfig;

const EXTENSIONS: &str = "
[req]
distinguished_name = name
[name]
[ca]
basicConstraints = critical, CA:TRUE
keyUsage = critical, keyCertSign
subjectKeyIdentifier = hash
[server]
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth
subjectAltName = DNS:localhost, DNS:nbd.example.com, IP:127.0.0.1
[client]
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature, keyEncipherment
extendedKeyUsage = clientAuth
";

/// A CA of its own, with a certificate for a server on localhost and one for a client.
pub struct Pki {
    dir: tempfile::TempDir,
}

impl Pki {
    pub fn new() -> Self {
        let pki = Self { dir: tempfile::tempdir().unwrap() };
        fs::write(pki.path("extensions.cnf"), EXTENSIONS).unwrap();
        pki.issue("ca", &[]);
        for name in ["server", "client"] {
            pki.issue(name, &["-CA", "ca-cert.pem", "-CAkey", "ca-key.pem"]);
        }
        // As the TLS clients want them: a directory without a client's certificate, and one with.
        for (folder, files) in [("anonymous", &["ca-cert"][..]), ("known", &["ca-cert", "client-cert", "client-key"])] {
            fs::create_dir(pki.path(folder)).unwrap();
            for file in files {
                fs::copy(pki.path(&format!("{file}.pem")), pki.path(folder).join(format!("{file}.pem"))).unwrap();
            }
        }
        pki
    }

    fn issue(&self, name: &str, signer: &[&str]) {
        let mut command = Command::new("openssl");
        command.args(["req", "-x509", "-config", "extensions.cnf", "-extensions", name, "-days", "2", "-nodes"]);
        command.args(["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-subj", &format!("/CN={name}")]);
        command.args(["-keyout", &format!("{name}-key.pem"), "-out", &format!("{name}-cert.pem")]).args(signer);
        let output = command.current_dir(self.dir.path()).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    /// The directory of a client that trusts this CA and has no certificate.
    pub fn anonymous(&self) -> String {
        self.text("anonymous")
    }

    /// The directory of a client with a certificate of this CA.
    pub fn known(&self) -> String {
        self.text("known")
    }

    /// A server with the certificate of this CA.
    pub fn server(&self, required: bool) -> TlsConfig {
        let (cert, key) = (self.path("server-cert.pem"), self.path("server-key.pem"));
        TlsConfig { required, cert, key, client_ca: None }
    }

    /// The same, for clients with a certificate of this CA alone.
    pub fn strict_server(&self) -> TlsConfig {
        TlsConfig { client_ca: Some(self.path("ca-cert.pem")), ..self.server(true) }
    }

    /// Puts the server's certificate and key where another's were.
    pub fn copy_server_files_to(&self, dir: &Path) {
        for file in ["server-cert.pem", "server-key.pem"] {
            fs::copy(self.path(file), dir.join(file)).unwrap();
        }
    }
}
