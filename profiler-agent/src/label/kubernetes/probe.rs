//! Tries out, for people, whether the pods of a node may be read.

use std::time::Duration;

use super::{Access, api::Api};

/// How long trying may take altogether.
const PATIENCE: Duration = Duration::from_secs(5);

/// What came of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Probed {
    /// Pods of the node.
    pub pods: usize,
}

/// Lists the pods of a node once, and begins to watch them. The error is one line, and names the way out.
pub fn probe(access: &Access, node: &str) -> Result<Probed, String> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| format!("it cannot be tried: {error}"))?;
    let outcome = runtime.block_on(async {
        let attempt = async {
            let api = Api::new(access, node, PATIENCE).await?;
            let mut pods = 0;
            let (version, _) = api.list(|_| pods += 1).await?;
            api.watch(&version, Some(1)).await?;
            Ok(Probed { pods })
        };
        match tokio::time::timeout(PATIENCE, attempt).await {
            Ok(outcome) => outcome,
            Err(_) => Err(super::api::ApiError::Silent(PATIENCE)),
        }
    });
    runtime.shutdown_background();
    outcome.map_err(|error: super::api::ApiError| error.to_string())
}
