//! Who is who: certificates on both sides, tokens, and settings that cannot work.

use std::{fs, path::Path};

use profiler_tests::{
    receiver::{Authority, Receiver, Validity},
    scratch,
};

use super::{
    super::{Accepted, Client, Endpoint, Protocol, Reason, Secret, Settings, Tls, UrlPath},
    BOTH, check_failed, http, on_runtime, options, request, send, settings,
};

/// A folder with an authority.
fn authority(test: &str) -> (std::path::PathBuf, Authority) {
    let folder = scratch(&format!("client-{test}"));
    let authority = Authority::new(&folder, "authority");
    (folder, authority)
}

fn trusting(receiver: &Receiver, protocol: Protocol, authority: &Authority) -> Settings {
    let tls = Tls { ca_file: Some(authority.file()), ..Tls::default() };
    Settings { tls, ..settings(&receiver.url(), protocol) }
}

/// Certificates are checked: who signed them, until when they are valid, and for which name.
#[test]
fn checks_certificates() {
    let (folder, authority) = authority("certificates");
    let other = Authority::new(&folder, "other");
    let names = "IP:127.0.0.1,DNS:localhost";
    let valid = authority.sign("valid", names, Validity::Now);
    let expired = authority.sign("expired", names, Validity::Expired);
    let elsewhere = authority.sign("elsewhere", "DNS:collector.example", Validity::Now);
    let own = authority.itself();
    for protocol in BOTH {
        let start = |identity| Receiver::start(options(protocol).with_tls(identity));
        let receiver = start(&valid);
        assert_eq!(send(trusting(&receiver, protocol, &authority)), Ok(Accepted::default()));
        let distrusting = trusting(&receiver, protocol, &other);
        let failure = check_failed(send(distrusting), Reason::TlsFailed, &["none of the authorities in", "other.pem"]);
        assert!(failure.is_retryable());
        let system = settings(&receiver.url(), protocol);
        check_failed(send(system), Reason::TlsFailed, &["this system trusts", "tls.ca_file"]);
        let receiver = start(&expired);
        check_failed(send(trusting(&receiver, protocol, &authority)), Reason::TlsFailed, &["has expired", "renew"]);
        let receiver = start(&own);
        check_failed(send(trusting(&receiver, protocol, &authority)), Reason::TlsFailed, &["CA:TRUE", "CA:FALSE"]);
        let receiver = start(&elsewhere);
        let mut settings = trusting(&receiver, protocol, &authority);
        let words = ["not for \"127.0.0.1\"", "collector.example", "tls.server_name"];
        check_failed(send(settings.clone()), Reason::TlsFailed, &words);
        settings.tls.server_name = Some("collector.example".to_owned());
        assert_eq!(send(settings), Ok(Accepted::default()));
    }
}

/// A receiver may want to know us by a certificate.
#[test]
fn is_known_by_a_certificate() {
    let (folder, authority) = authority("client-certificates");
    let other = Authority::new(&folder, "other");
    let identity = authority.sign("receiver", "IP:127.0.0.1", Validity::Now);
    let ours = authority.sign("ours", "DNS:agent", Validity::Now);
    let theirs = other.sign("theirs", "DNS:agent", Validity::Now);
    for protocol in BOTH {
        let options = options(protocol).with_tls(&identity).requiring_clients_of(&authority);
        let receiver = Receiver::start(options);
        let mut settings = trusting(&receiver, protocol, &authority);
        check_failed(send(settings.clone()), Reason::TlsFailed, &["asks for a client certificate", "tls.cert_file"]);
        (settings.tls.cert_file, settings.tls.key_file) =
            (Some(theirs.cert_file.clone()), Some(theirs.key_file.clone()));
        check_failed(send(settings.clone()), Reason::TlsFailed, &["does not accept the client certificate"]);
        (settings.tls.cert_file, settings.tls.key_file) = (Some(ours.cert_file.clone()), Some(ours.key_file.clone()));
        assert_eq!(send(settings), Ok(Accepted::default()));
    }
}

/// Whether to use TLS is the one thing both sides have to agree on beforehand.
#[test]
fn tells_who_speaks_tls() {
    let (_, authority) = authority("plain");
    let identity = authority.sign("receiver", "IP:127.0.0.1", Validity::Now);
    for protocol in BOTH {
        let encrypted = Receiver::start(options(protocol).with_tls(&identity));
        let plain = settings(&encrypted.url().replace("https", "http"), protocol);
        assert!(check_failed(send(plain), Reason::TlsFailed, &["expects TLS", "https://"]).is_retryable());
        let plain = Receiver::start(options(protocol));
        let mut encrypted = trusting(&plain, protocol, &authority);
        encrypted.endpoint =
            Endpoint::parse(&plain.url().replace("http", "https"), protocol, UrlPath::OrStandard).expect("a URL");
        assert!(check_failed(send(encrypted), Reason::TlsFailed, &["not speak TLS", "http://"]).is_retryable());
        // The other protocol's TLS port.
        let other = if protocol == Protocol::Grpc { Protocol::HttpProtobuf } else { Protocol::Grpc };
        let receiver = Receiver::start(options(other).with_tls(&identity));
        check_failed(send(trusting(&receiver, protocol, &authority)), Reason::TlsFailed, &["does not offer HTTP/"]);
    }
}

/// Moves a file into place, as those who renew certificates and tokens do.
fn replace(from: &Path, to: &Path) {
    let temporary = to.with_extension("new");
    fs::copy(from, &temporary).expect("a copy");
    fs::rename(&temporary, to).expect("renamed");
}

/// Certificates that are renewed are used from then on; one whose key is not there yet, from when it is.
#[test]
fn follows_renewed_certificates() {
    let (folder, authority) = authority("renewal");
    let identity = authority.sign("receiver", "IP:127.0.0.1", Validity::Now);
    let expired = authority.sign("expired", "DNS:agent", Validity::Expired);
    let renewed = authority.sign("renewed", "DNS:agent", Validity::Now);
    let (cert_file, key_file) = (folder.join("tls.crt"), folder.join("tls.key"));
    for protocol in BOTH {
        replace(&expired.cert_file, &cert_file);
        replace(&expired.key_file, &key_file);
        let receiver = Receiver::start(options(protocol).with_tls(&identity).requiring_clients_of(&authority));
        let mut settings = trusting(&receiver, protocol, &authority);
        (settings.tls.cert_file, settings.tls.key_file) = (Some(cert_file.clone()), Some(key_file.clone()));
        let mut client = Client::new(settings).expect("valid settings");
        on_runtime(async || {
            let words = ["does not accept the client certificate", "CertificateExpired"];
            check_failed(client.send(&request()).await, Reason::TlsFailed, &words);
            replace(&renewed.cert_file, &cert_file);
            check_failed(client.send(&request()).await, Reason::TlsFailed, &words);
            replace(&renewed.key_file, &key_file);
            assert_eq!(client.send(&request()).await, Ok(Accepted::default()));
            // A connection that began with what is old now is not used again.
            replace(&renewed.cert_file, &cert_file);
            assert_eq!(client.send(&request()).await, Ok(Accepted::default()));
            let received = receiver.received();
            assert_ne!(received[0].connection, received[1].connection);
        });
    }
}

/// A token is read for each request, and never shown.
#[test]
fn follows_renewed_tokens() {
    let folder = scratch("client-tokens");
    let token = folder.join("token");
    for protocol in BOTH {
        fs::write(&token, "token-hunter2\n").expect("a token");
        let receiver = Receiver::start(options(protocol));
        let settings = Settings {
            bearer_token_file: Some(token.clone()),
            headers: Vec::new(),
            ..settings(&receiver.url(), protocol)
        };
        assert!(!format!("{settings:?}").contains("hunter2"));
        let mut client = Client::new(settings).expect("valid settings");
        on_runtime(async || {
            assert_eq!(client.send(&request()).await, Ok(Accepted::default()));
            fs::write(&token, "another").expect("a token");
            assert_eq!(client.send(&request()).await, Ok(Accepted::default()));
            fs::remove_file(&token).expect("removed");
            let failure =
                check_failed(client.send(&request()).await, Reason::NoCredentials, &["token", "cannot be read"]);
            assert!(failure.is_retryable());
            fs::write(&token, "third-hunter2").expect("a token");
            receiver.answer(http(401, &[("content-type", "text/plain")], "bad token third-hunter2"));
            check_failed(client.send(&request()).await, Reason::Unauthorized, &["bad token ***"]);
        });
        let sent: Vec<_> =
            receiver.received().iter().map(|received| received.headers["authorization"].clone()).collect();
        assert_eq!(sent, ["Bearer token-hunter2", "Bearer another", "Bearer third-hunter2"]);
    }
}

/// What cannot work is refused before anything is sent, by the name of its setting.
#[test]
fn refuses_what_cannot_work() {
    let (folder, authority) = authority("settings");
    let other = authority.sign("other", "DNS:other", Validity::Now);
    let ours = authority.sign("ours", "DNS:ours", Validity::Now);
    let empty = folder.join("empty");
    fs::write(&empty, "hunter2 \n hunter2").expect("a file");
    let check = |change: &dyn Fn(&mut Settings), setting: &str, words: &[&str]| {
        let mut settings = settings("https://127.0.0.1:4317", Protocol::Grpc);
        change(&mut settings);
        let error = Client::new(settings).expect_err(setting);
        println!("{error}");
        let text = error.to_string();
        assert!(error.setting == setting && !text.contains("hunter2"), "{text}");
        assert!(words.iter().all(|word| text.contains(word)), "{text} does not say {words:?}");
    };
    let missing = || Some(folder.join("missing"));
    check(&|to| to.tls.ca_file = missing(), "tls.ca_file", &["missing cannot be read", "No such file"]);
    check(&|to| to.tls.ca_file = Some(folder.clone()), "tls.ca_file", &["cannot be read", "no regular file"]);
    check(&|to| to.tls.ca_file = Some("/dev/zero".into()), "tls.ca_file", &["cannot be read"]);
    check(&|to| to.tls.ca_file = Some(empty.clone()), "tls.ca_file", &["holds no certificate"]);
    check(&|to| to.tls.cert_file = Some(ours.cert_file.clone()), "tls.key_file", &["tls.cert_file needs"]);
    check(&|to| to.tls.key_file = Some(ours.key_file.clone()), "tls.cert_file", &["tls.key_file needs"]);
    let with_key = |to: &mut Settings, key: &Path| {
        (to.tls.cert_file, to.tls.key_file) = (Some(ours.cert_file.clone()), Some(key.to_owned()));
    };
    check(&|to| with_key(to, &other.key_file), "tls.key_file", &["not the certificate's"]);
    check(&|to| with_key(to, &ours.cert_file), "tls.key_file", &["holds no private key"]);
    check(&|to| to.tls.server_name = Some("a b".to_owned()), "tls.server_name", &["DNS name"]);
    check(&|to| to.bearer_token_file = missing(), "bearer_token_file", &["cannot be read"]);
    check(&|to| to.bearer_token_file = Some(empty.clone()), "bearer_token_file", &["one token"]);
    check(&|to| to.headers = vec![("host".to_owned(), Secret::new("hunter2"))], "headers", &["\"host\""]);
    let token = folder.join("token");
    fs::write(&token, "hunter2").expect("a token");
    let authorization = ("Authorization".to_owned(), Secret::new("Basic hunter2"));
    check(
        &|to| (to.headers, to.bearer_token_file) = (vec![authorization.clone()], Some(token.clone())),
        "bearer_token_file",
        &["leave one of them out"],
    );
}
