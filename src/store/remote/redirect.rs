//! What a redirect says: where it points, and which setting is right.
//!
//! No redirect is followed, so its error is all that an operator learns. S3 names the bucket's region and endpoint; of any
//! other redirect only the target is known, without its query, which may be a signature.

use hyper::Uri;
use hyper::header::{HeaderMap, LOCATION};
use reqwest::Url;

use super::answer::{cut, element};

/// Where S3 names the region of a bucket.
const REGION_HEADER: &str = "x-amz-bucket-region";
/// What S3 calls a signature for another region than the bucket's: a redirect without a target.
const WRONG_REGION: &str = "AuthorizationHeaderMalformed";

/// What to do about an answer to a request for `uri`; `None` if it is no redirect.
pub(super) fn directions(uri: &Uri, status: u16, headers: &HeaderMap, body: &str) -> Option<String> {
    let redirect = (300..=399).contains(&status) && status != 304;
    if !redirect && element(body, "Code") != WRONG_REGION {
        return None;
    }
    let asked = Url::parse(&uri.to_string()).ok()?;
    let header = |name| headers.get(name).and_then(|value| value.to_str().ok());
    let target = header(LOCATION.as_str()).and_then(|target| asked.join(target).ok()).map(bare);
    let region = header(REGION_HEADER).map(cut).or_else(|| text(body, "Region"));
    let endpoint = text(body, "Endpoint").map(|endpoint| service(&asked, &endpoint, text(body, "Bucket")));
    let points = match &target {
        Some(target) => cut(&format!("it redirects to {target}, and no redirect is followed")),
        None if region.is_some() || endpoint.is_some() => "the bucket is elsewhere".into(),
        None if redirect => "it redirects without saying where".into(),
        None => return None,
    };
    Some(match (region, endpoint, target) {
        (Some(region), Some(endpoint), _) => format!("{points}: use --region {region} and --endpoint-url {endpoint}"),
        (Some(region), None, _) => format!("{points}: use --region {region}"),
        (None, Some(endpoint), _) => format!("{points}: use --endpoint-url {endpoint}"),
        (None, None, Some(target)) => {
            format!("{points}: if the store is there, use --endpoint-url {}", target.origin().ascii_serialization())
        }
        (None, None, None) => points,
    })
}

/// The content of an XML element, if there is any.
fn text(body: &str, tag: &str) -> Option<String> {
    Some(cut(element(body, tag))).filter(|text| !text.is_empty())
}

/// A URL without what may be secret.
fn bare(mut url: Url) -> Url {
    url.set_query(None);
    url.set_fragment(None);
    // These fail on a URL without a host alone, which has neither.
    let _ = url.set_username("");
    let _ = url.set_password(None);
    url
}

/// The address of the service, of S3's name for the bucket's: the bucket stands in the path, as in every request here.
fn service(asked: &Url, endpoint: &str, bucket: Option<String>) -> String {
    let bucket = bucket.or_else(|| Some(asked.path_segments()?.next()?.to_owned())).unwrap_or_default();
    let endpoint = endpoint.strip_prefix(&bucket).and_then(|rest| rest.strip_prefix('.')).unwrap_or(endpoint);
    if endpoint.contains("://") { endpoint.to_owned() } else { format!("{}://{endpoint}", asked.scheme()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(status: u16, headers: &[(&'static str, &str)], body: &str) -> Option<String> {
        let uri = Uri::from_static("https://s3.us-east-1.amazonaws.com/disks/exports/vm/volume.json");
        let headers = headers.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect();
        directions(&uri, status, &headers, body)
    }

    #[test]
    fn the_settings_that_s3_names_are_given_as_flags() {
        let body = "<Error><Code>PermanentRedirect</Code><Endpoint>disks.s3.eu-central-1.amazonaws.com</Endpoint>\
                    <Bucket>disks</Bucket></Error>";
        let both = "--region eu-central-1 and --endpoint-url https://s3.eu-central-1.amazonaws.com";
        let region = [("x-amz-bucket-region", "eu-central-1")];
        assert_eq!(said(301, &region, body).unwrap(), format!("the bucket is elsewhere: use {both}"));
        let target = ("location", "https://disks.s3.eu-central-1.amazonaws.com/exports/vm/volume.json");
        let points = format!("it redirects to {}, and no redirect is followed", target.1);
        assert_eq!(said(307, &[region[0], target], body).unwrap(), format!("{points}: use {both}"));
        // The bucket of our own request, if the answer names none; a HEAD has no body at all.
        let unnamed = "<Endpoint>disks.s3.eu-central-1.amazonaws.com</Endpoint>";
        assert!(said(301, &[], unnamed).unwrap().ends_with("use --endpoint-url https://s3.eu-central-1.amazonaws.com"));
        assert!(said(301, &region, "").unwrap().ends_with("use --region eu-central-1"));
        let malformed = "<Error><Code>AuthorizationHeaderMalformed</Code><Region>eu-central-1</Region></Error>";
        assert!(said(400, &[], malformed).unwrap().ends_with("use --region eu-central-1"));
    }

    #[test]
    fn a_redirect_elsewhere_names_its_target_without_the_query() {
        for (target, names, setting) in [
            ("https://me:pw@login.example/sso?token=hush#x", "https://login.example/sso", "https://login.example"),
            ("http://[::1]:9000/a", "http://[::1]:9000/a", "http://[::1]:9000"),
            ("//other.example/a", "https://other.example/a", "https://other.example"),
            ("/elsewhere?a=b", "https://s3.us-east-1.amazonaws.com/elsewhere", "https://s3.us-east-1.amazonaws.com"),
            ("a", "https://s3.us-east-1.amazonaws.com/disks/exports/vm/a", "https://s3.us-east-1.amazonaws.com"),
        ] {
            let points = format!("it redirects to {names}, and no redirect is followed");
            let whole = format!("{points}: if the store is there, use --endpoint-url {setting}");
            assert_eq!(said(302, &[("location", target)], "").unwrap(), whole);
        }
        for headers in [&[][..], &[("location", "http://[")]] {
            assert_eq!(said(303, headers, "").unwrap(), "it redirects without saying where");
        }
    }

    #[test]
    fn an_answer_that_is_no_redirect_gives_no_directions() {
        assert_eq!(said(403, &[("x-amz-bucket-region", "us-east-1")], "<Code>AccessDenied</Code>"), None);
        assert_eq!(said(304, &[], ""), None);
        assert_eq!(said(400, &[], "<Code>AuthorizationHeaderMalformed</Code>"), None);
    }
}
