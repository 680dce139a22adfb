//! A receiver of OTLP profiles that prints what arrives: the hottest functions of every export.
//!
//! `cargo xtask run` starts it, so that a first look needs no backend. It stores nothing.

use std::{collections::HashMap, net::SocketAddr, process::ExitCode, time::Duration};

use anyhow::{Context as _, bail};
use opentelemetry_proto::tonic::{
    collector::profiles::v1development::{
        ExportProfilesServiceRequest, ExportProfilesServiceResponse,
        profiles_service_server::{ProfilesService, ProfilesServiceServer},
    },
    common::v1::any_value::Value,
    profiles::v1development::{ProfilesDictionary, ResourceProfiles},
};
use tonic::{Request, Response, Status, codec::CompressionEncoding, transport::Server};

/// Rows printed per export.
const TOP: usize = 12;
/// Time left to senders after Ctrl-C.
const GRACE: Duration = Duration::from_secs(3);
/// Largest request accepted, bytes.
const MAX_REQUEST: usize = 16 << 20;

struct Sink;

#[tonic::async_trait]
impl ProfilesService for Sink {
    async fn export(
        &self,
        request: Request<ExportProfilesServiceRequest>,
    ) -> Result<Response<ExportProfilesServiceResponse>, Status> {
        let request = request.into_inner();
        let dictionary = request.dictionary.unwrap_or_default();
        let mut by_function: HashMap<(String, String), i64> = HashMap::new();
        for resource in &request.resource_profiles {
            let service = service_name(resource);
            let profiles = resource.scope_profiles.iter().flat_map(|scope| &scope.profiles);
            // (Waits have no period: they are another unit.)
            for sample in profiles.filter(|profile| profile.period != 0).flat_map(|profile| &profile.samples) {
                let leaf = leaf_name(&dictionary, sample.stack_index).unwrap_or_else(|| "[no stack]".to_owned());
                *by_function.entry((service.clone(), leaf)).or_default() += sample.values.iter().sum::<i64>();
            }
        }
        print_hottest(by_function);
        Ok(Response::new(ExportProfilesServiceResponse::default()))
    }
}

fn service_name(resource: &ResourceProfiles) -> String {
    let attributes = resource.resource.iter().flat_map(|resource| &resource.attributes);
    let name = attributes.filter(|attribute| attribute.key == "service.name").find_map(|attribute| {
        match attribute.value.as_ref()?.value.as_ref()? {
            Value::StringValue(name) => Some(name.clone()),
            _ => None,
        }
    });
    name.unwrap_or_else(|| "unknown".to_owned())
}

/// Name of a stack's leaf function; the file it is in where it has none.
fn leaf_name(dictionary: &ProfilesDictionary, stack: i32) -> Option<String> {
    let index = |index: i32| usize::try_from(index).ok();
    let text = |at: i32| dictionary.string_table.get(index(at)?).cloned();
    let leaf = *dictionary.stack_table.get(index(stack)?)?.location_indices.first()?;
    let location = dictionary.location_table.get(index(leaf)?)?;
    match location.lines.first() {
        Some(line) => text(dictionary.function_table.get(index(line.function_index)?)?.name_strindex),
        None => {
            let mapping = dictionary.mapping_table.get(index(location.mapping_index)?)?;
            let path = text(mapping.filename_strindex)?;
            Some(format!("{}+{:#x}", path.rsplit('/').next().unwrap_or_default(), location.address))
        }
    }
}

fn print_hottest(by_function: HashMap<(String, String), i64>) {
    let total: i64 = by_function.values().sum();
    let mut rows: Vec<_> = by_function.into_iter().collect();
    rows.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
    println!("{total} samples");
    for ((service, function), count) in rows.into_iter().take(TOP) {
        println!("  {:5.1} %  {service:20.20}  {function}", 100.0 * count as f64 / total.max(1) as f64);
    }
}

/// Ctrl-C in a shell interrupts sender and receiver at once: the sender gets the time to send its last profile.
async fn interrupted() {
    if tokio::signal::ctrl_c().await.is_ok() {
        tokio::time::sleep(GRACE).await;
    }
}

fn listen_address() -> anyhow::Result<SocketAddr> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        [] => Ok(SocketAddr::from(([127, 0, 0, 1], 4317))),
        ["--listen", address] => address.parse().with_context(|| format!("{address:?} is not an address")),
        _ => bail!("usage: otlp-sink [--listen ADDRESS]"),
    }
}

fn main() -> ExitCode {
    let serve = || -> anyhow::Result<()> {
        let address = listen_address()?;
        let service = ProfilesServiceServer::new(Sink)
            .accept_compressed(CompressionEncoding::Gzip)
            .max_decoding_message_size(MAX_REQUEST);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime
            .block_on(Server::builder().add_service(service).serve_with_shutdown(address, interrupted()))
            .with_context(|| format!("cannot listen on {address}"))
    };
    match serve() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("otlp-sink: error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
