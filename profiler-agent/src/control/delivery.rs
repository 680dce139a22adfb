//! Where profiles go, as the configuration has it.

use crate::{
    config::{self, FileFormat},
    export::{self, Format, delivery, files, otlp},
    status::Stats,
};

/// The configuration in the exporters' own words.
pub(super) fn delivery_options(export: config::Export) -> delivery::Options {
    let limits = |bytes, age| export::Limits { bytes, age };
    delivery::Options {
        destinations: export.destinations,
        spool: export.spool.map(|spool| delivery::SpoolOptions {
            folder: spool.folder,
            limits: limits(spool.bytes, Some(spool.max_age)),
        }),
        queue_bytes: export.queue_bytes,
        files: export.files.map(|files| files::Settings {
            folder: files.folder,
            format: match files.format {
                FileFormat::Pprof => Format::Pprof,
                FileFormat::Otlp => Format::Otlp,
            },
            limits: limits(files.bytes, None),
        }),
        encoding: otlp::Options { original_payload: export.original_payload },
    }
}

/// Where profiles go, for people.
pub(super) fn destinations(stats: &Stats) -> String {
    stats.destinations().iter().map(|destination| destination.name.as_str()).collect::<Vec<_>>().join(", ")
}
