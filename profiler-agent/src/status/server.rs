//! The status endpoint: `/metrics`, `/healthz`, `/readyz`, `/debug/state`.

use std::{convert::Infallible, net::IpAddr, sync::Arc, time::Duration};

use http_body_util::Full;
use hyper::{
    Method, Request, Response, StatusCode,
    body::Bytes,
    header::{CONTENT_TYPE, HeaderValue},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{net::TcpListener, sync::Semaphore};
use tracing::debug;

use super::{Stats, metrics, state};

/// Connections served at once; further ones wait in the listener's backlog.
const MAX_CONNECTIONS: usize = 32;
/// How long a client may take to send its request's head.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);

/// Answers requests until the runtime ends.
pub async fn serve(listener: TcpListener, stats: Arc<Stats>) {
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
        let stats = Arc::clone(&stats);
        tokio::spawn(async move {
            let service = service_fn(|request| {
                let response = answer(&request, peer, &stats);
                async { Ok::<_, Infallible>(response) }
            });
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD_TIMEOUT)
                .serve_connection(TokioIo::new(stream), service);
            if let Err(error) = connection.await {
                debug!("a status connection ended: {error}");
            }
            drop(permit);
        });
    }
}

fn answer<B>(request: &Request<B>, peer: IpAddr, stats: &Stats) -> Response<Full<Bytes>> {
    if request.method() != Method::GET && request.method() != Method::HEAD {
        return text(StatusCode::METHOD_NOT_ALLOWED, "only GET is supported\n".to_owned());
    }
    match request.uri().path() {
        "/metrics" => {
            let mut response = text(StatusCode::OK, metrics::render(stats));
            response
                .headers_mut()
                .insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8"));
            response
        }
        // Others learn how the agent is, not what runs on its machine.
        "/debug/state" if !peer.is_loopback() => text(
            StatusCode::FORBIDDEN,
            "only from the agent's own machine or pod: try `kubectl port-forward`\n".to_owned(),
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
        let stats = Stats::default();
        let ask = |path: &str, peer: IpAddr| {
            let request = Request::builder().uri(path).body(()).expect("a request");
            answer(&request, peer, &stats).status()
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
}
