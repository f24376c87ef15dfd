//! What of a request must not be repeated, should the other side echo it in the text of an error.

use hyper::header::HeaderMap;
use object_store::client::HttpRequest;
use percent_encoding::percent_decode_str;

/// A shorter one is no secret, but may be a word.
const MIN_SECRET_BYTES: usize = 8;
/// How much of a form is searched.
const MAX_FORM_BYTES: usize = 64 << 10;
/// What stands in its place.
const MASK: &str = "***";
/// What the names of such headers and fields have in them, in lower case.
const NAMES: [&str; 7] = ["token", "credential", "signature", "secret", "assertion", "accesskeyid", "password"];

/// The credentials in a request: those that sign it, and those that are lent or asked for with it.
#[derive(Debug, Default)]
pub(super) struct Secrets(Vec<String>);

impl Secrets {
    /// Of a request that is about to be sent.
    pub(super) fn of(request: &HttpRequest) -> Self {
        let mut secrets = Self::default();
        for (name, value) in request.headers() {
            let Ok(value) = value.to_str() else { continue };
            if name == "authorization" {
                secrets.authorization(value);
            } else if is_secret(name.as_str()) {
                secrets.add(value);
            }
        }
        secrets.fields(request.uri().query().unwrap_or_default());
        let is_form =
            request.headers().get("content-type").is_some_and(|kind| kind.as_bytes().ends_with(b"urlencoded"));
        if let Some(form) = request.body().as_bytes().filter(|form| is_form && form.len() <= MAX_FORM_BYTES) {
            secrets.fields(&String::from_utf8_lossy(form));
        }
        secrets
    }

    /// A scheme, then `TOKEN`, `ACCOUNT:SIGNATURE`, or fields of which some are secret.
    fn authorization(&mut self, value: &str) {
        let Some((scheme, rest)) = value.split_once(' ') else { return self.add(value) };
        if scheme.contains("HMAC") {
            self.fields(&rest.replace(", ", "&").replace(',', "&"));
        } else {
            self.add(rest.rsplit(':').next().unwrap_or(rest));
        }
    }

    /// The fields of a query or a form.
    fn fields(&mut self, encoded: &str) {
        for (name, value) in encoded.split('&').filter_map(|field| field.split_once('=')) {
            if is_secret(name) {
                self.add(value);
            }
        }
    }

    fn add(&mut self, value: &str) {
        let plain = percent_decode_str(value).decode_utf8_lossy();
        // Of `KEY-ID/date/region/…/aws4_request` the first part alone is one.
        let is_scope = plain.ends_with("_request");
        let secret = if is_scope { plain.split('/').next().unwrap_or_default() } else { &*plain };
        for secret in [secret, if is_scope { "" } else { value }] {
            if secret.len() >= MIN_SECRET_BYTES && !self.0.iter().any(|known| known == secret) {
                self.0.push(secret.to_owned());
            }
        }
        // The longest first: what holds another is masked whole.
        self.0.sort_by_key(|secret| std::cmp::Reverse(secret.len()));
    }

    /// Takes them out of the headers of an answer.
    pub(super) fn mask(&self, headers: &mut HeaderMap) {
        for value in headers.values_mut() {
            if let Some(masked) = value.to_str().ok().and_then(|text| self.masked(text).parse().ok()) {
                *value = masked;
            }
        }
    }

    /// The same text without them.
    pub(super) fn masked(&self, text: &str) -> String {
        self.0.iter().fold(text.to_owned(), |text, secret| text.replace(secret, MASK))
    }
}

fn is_secret(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    name == "sig" || NAMES.iter().any(|part| name.contains(part))
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use object_store::client::HttpRequestBody;

    use super::*;

    fn of(uri: &str, headers: &[(&'static str, &str)], body: &'static str) -> Secrets {
        let mut request = HttpRequest::new(HttpRequestBody::from(Bytes::from_static(body.as_bytes())));
        *request.uri_mut() = uri.parse().unwrap();
        for (name, value) in headers {
            request.headers_mut().insert(*name, value.parse().unwrap());
        }
        Secrets::of(&request)
    }

    #[test]
    fn what_signs_a_request_is_masked_and_what_only_describes_it_is_not() {
        let signed = "AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE0/20260101/us-east-1/s3/aws4_request, \
                      SignedHeaders=host;x-amz-date, Signature=0123456789abcdef";
        let secrets = of(
            "http://s.example/disks?X-Amz-Security-Token=a%2Fb%2Bcdefgh&prefix=exports/secretive-disk&sig=sas%3Dsignature",
            &[("authorization", signed), ("x-amz-security-token", "session-token-1")],
            "",
        );
        for (said, shown) in [
            ("no key AKIDEXAMPLE0 here", "no key *** here"),
            (
                "Credential=AKIDEXAMPLE0/20260101/us-east-1/s3/aws4_request",
                "Credential=***/20260101/us-east-1/s3/aws4_request",
            ),
            ("token session-token-1, a/b+cdefgh or a%2Fb%2Bcdefgh", "token ***, *** or ***"),
            ("0123456789abcdef", "***"),
            ("sas=signature sas%3Dsignature", "*** ***"),
            (
                "use us-east-1 for exports/secretive-disk, and send x-amz-date",
                "use us-east-1 for exports/secretive-disk, and send x-amz-date",
            ),
        ] {
            assert_eq!(secrets.masked(said), shown);
        }
    }

    #[test]
    fn tokens_that_are_asked_for_and_shown_are_masked() {
        let form = [("content-type", "application/x-www-form-urlencoded"), ("authorization", "Bearer tokentoken==")];
        let secrets =
            of("http://login.example/t", &form, "client_id=vm&client_secret=hush%21hush&grant_type=client_credentials");
        assert_eq!(secrets.masked("hush!hush tokentoken== client_credentials"), "*** *** client_credentials");
        let shared = of("http://a.example/", &[("authorization", "SharedKey account:c2lnbmF0dXJl")], "");
        assert_eq!(shared.masked("account has no c2lnbmF0dXJl"), "account has no ***");
        // A word is no secret.
        assert_eq!(of("http://a.example/?token=the", &[], "").masked("the end"), "the end");
    }
}
