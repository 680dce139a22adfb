//! The status endpoint: `/metrics`, `/healthz`, `/readyz`, `/debug/state`.

use std::{convert::Infallible, net::IpAddr, sync::Arc, time::Duration};

use http_body_util::Full;
use hyper::{
    Method, Request, Response, StatusCode,
    body::Bytes,
    header::{CONTENT_TYPE, HeaderValue, WWW_AUTHENTICATE},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpListener,
    sync::Semaphore,
    time::timeout,
};
use tokio_rustls::TlsAcceptor;
use tracing::{debug, warn};

use super::{
    Stats,
    access::{Access, Token},
    metrics, state,
};

/// Connections served at once; further ones wait in the listener's backlog.
const MAX_CONNECTIONS: usize = 32;
/// How long a client may take to send its request's head.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);
/// How long it may take until TLS is spoken.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a connection is served: who takes nothing of what was asked for would keep it.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(60);

/// Whom a connection serves.
struct Client {
    peer: IpAddr,
    /// What has to be known; `None`: nothing.
    token: Option<Arc<Token>>,
    stats: Arc<Stats>,
}

/// Answers requests until the runtime ends.
pub async fn serve(listener: TcpListener, mut access: Access, stats: Arc<Stats>) {
    let is_local = listener.local_addr().is_ok_and(|address| address.ip().is_loopback());
    if access.has_bare_token() && !is_local {
        warn!("the status endpoint's token is sent in plain text: set status.tls");
    }
    let connections = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        // SANITY: the semaphore is never closed.
        let Ok(permit) = Arc::clone(&connections).acquire_owned().await else { return };
        let (stream, peer) = match listener.accept().await {
            Ok((stream, peer)) => (stream, peer.ip().to_canonical()),
            Err(error) => {
                debug!("a status connection was not accepted: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let client = Client { peer, token: access.token(), stats: Arc::clone(&stats) };
        let tls = access.tls().map(TlsAcceptor::from);
        tokio::spawn(async move {
            match tls {
                None => answer_requests(stream, &client).await,
                Some(tls) => match timeout(HANDSHAKE_TIMEOUT, tls.accept(stream)).await {
                    Ok(Ok(stream)) => answer_requests(stream, &client).await,
                    Ok(Err(error)) => debug!("a status connection does not speak TLS: {error}"),
                    Err(_) => debug!("a status connection does not begin to speak TLS"),
                },
            }
            drop(permit);
        });
    }
}

async fn answer_requests(stream: impl AsyncRead + AsyncWrite + Unpin, client: &Client) {
    let service = service_fn(|request| {
        let response = answer(&request, client);
        async { Ok::<_, Infallible>(response) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .serve_connection(TokioIo::new(stream), service);
    match timeout(CONNECTION_TIMEOUT, connection).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => debug!("a status connection ended: {error}"),
        Err(_) => debug!("a status connection was ended after {} s", CONNECTION_TIMEOUT.as_secs()),
    }
}

fn answer<B>(request: &Request<B>, client: &Client) -> Response<Full<Bytes>> {
    let stats = &client.stats;
    if request.method() != Method::GET && request.method() != Method::HEAD {
        return text(StatusCode::METHOD_NOT_ALLOWED, "only GET is supported\n".to_owned());
    }
    let path = request.uri().path();
    // (Kubelets' probes have no token, and learn no more than whether the agent works.)
    let is_open = matches!(path, "/healthz" | "/readyz");
    if !is_open && client.token.as_ref().is_some_and(|token| !token.is_in(request.headers())) {
        let mut response = text(StatusCode::UNAUTHORIZED, "the token is missing or wrong\n".to_owned());
        response.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        return response;
    }
    match path {
        "/metrics" => {
            let mut response = text(StatusCode::OK, metrics::render(stats));
            response
                .headers_mut()
                .insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8"));
            response
        }
        // Others learn how the agent is, not what runs on its machine, unless they have the token.
        "/debug/state" if client.token.is_none() && !client.peer.is_loopback() => text(
            StatusCode::FORBIDDEN,
            "only from the agent's own machine or pod: try `kubectl port-forward`, or set status.token_file\n"
                .to_owned(),
        ),
        "/debug/state" => {
            let mut response = text(StatusCode::OK, state::render(stats));
            response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
            response
        }
        "/healthz" => text(StatusCode::OK, "ok\n".to_owned()),
        "/readyz" if stats.is_ready() => text(StatusCode::OK, "ready\n".to_owned()),
        "/readyz" if stats.is_stopped() => text(StatusCode::SERVICE_UNAVAILABLE, "stopped\n".to_owned()),
        "/readyz" => text(StatusCode::SERVICE_UNAVAILABLE, "not sampling\n".to_owned()),
        _ => text(StatusCode::NOT_FOUND, "try /metrics, /healthz, /readyz or /debug/state\n".to_owned()),
    }
}

fn text(status: StatusCode, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use super::*;

    /// What runs on the machine is told to the machine alone; how the agent is, to everybody who may connect.
    #[test]
    fn others_are_told_less() {
        let ask = |path: &str, peer: IpAddr| {
            let request = Request::builder().uri(path).body(()).expect("a request");
            answer(&request, &Client { peer, token: None, stats: Arc::default() }).status()
        };
        let far: IpAddr = Ipv4Addr::new(10, 0, 0, 7).into();
        for near in [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()] {
            assert_eq!(ask("/debug/state", near), StatusCode::OK);
        }
        assert_eq!(ask("/debug/state", far), StatusCode::FORBIDDEN);
        for (path, status) in [("/metrics", 200), ("/healthz", 200), ("/readyz", 503), ("/", 404)] {
            assert_eq!(ask(path, far), status, "{path}");
        }
    }

    /// Who has the token is told everything, wherever they are; who has not, what probes have to know.
    #[test]
    fn a_token_is_asked_for() {
        let token = Arc::new(Token::new("s3cret"));
        let ask = |path: &str, token_sent: &str, peer: IpAddr| {
            let request = Request::builder().uri(path).header("authorization", format!("Bearer {token_sent}"));
            let client = Client { peer, token: Some(Arc::clone(&token)), stats: Arc::default() };
            answer(&request.body(()).expect("a request"), &client)
        };
        for peer in [Ipv4Addr::new(10, 0, 0, 7), Ipv4Addr::LOCALHOST].map(IpAddr::from) {
            for (path, status) in [("/metrics", 200), ("/debug/state", 200), ("/", 404), ("/readyz", 503)] {
                assert_eq!(ask(path, "s3cret", peer).status(), status, "{path}");
            }
            for (path, status) in [("/metrics", 401), ("/debug/state", 401), ("/", 401), ("/healthz", 200)] {
                let refused = ask(path, "secret", peer);
                assert_eq!(refused.status(), status, "{path}");
                assert_eq!(refused.headers().get(WWW_AUTHENTICATE).is_some(), status == 401);
            }
        }
    }
}
