//! Where a recording goes: standard output, a device or pipe, or a file that appears only when it is whole.

use std::{
    fs,
    io::Write as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};

use crate::whole_file::WholeFile;

/// Where the recording goes. Checked before it begins; an existing file is replaced only by a whole new one.
pub(super) enum Output {
    Stdout,
    /// A device or pipe, written to directly.
    Special(PathBuf),
    File {
        path: PathBuf,
        /// Until it is written.
        whole: Option<WholeFile>,
    },
}

impl Output {
    /// Checks that the place can be written.
    pub(super) fn open(path: PathBuf) -> anyhow::Result<Self> {
        if path == Path::new("-") {
            return Ok(Self::Stdout);
        }
        let given = path;
        // A link is followed to what it names, never replaced.
        let path = fs::canonicalize(&given).unwrap_or_else(|_| given.clone());
        let cannot = || format!("{} cannot be written", given.display());
        let is_device = |path: &Path| path.starts_with("/dev") || path.starts_with("/proc");
        let is_special = is_device(&given) || is_device(&path);
        match fs::metadata(&path) {
            Ok(metadata) if metadata.is_dir() => bail!("{} is a directory; name a file in it", given.display()),
            Ok(metadata) if is_special || !metadata.is_file() => {
                append_to(&given).with_context(cannot)?;
                return Ok(Self::Special(given));
            }
            Err(error) if is_special => return Err(error).with_context(cannot),
            Ok(_) => {
                append_to(&path).with_context(cannot)?;
            }
            Err(_) => {}
        }
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(format!(".partial-{}", std::process::id()));
        let temporary = path.with_file_name(name);
        let whole = WholeFile::create(temporary, 0o666).with_context(cannot)?;
        Ok(Self::File { path, whole: Some(whole) })
    }

    /// Writes the recording.
    pub(super) fn write(&mut self, bytes: &[u8]) -> anyhow::Result<()> {
        match self {
            Self::Stdout => {
                let mut stdout = std::io::stdout().lock();
                stdout.write_all(bytes).and_then(|()| stdout.flush()).context("standard output cannot be written")
            }
            Self::Special(path) => append_to(path)
                .and_then(|mut file| file.write_all(bytes))
                .with_context(|| format!("{} cannot be written", path.display())),
            Self::File { path, whole } => {
                let mut whole = whole.take().context("a recording is written once")?;
                whole
                    .file
                    .write_all(bytes)
                    .and_then(|()| whole.keep(path))
                    .with_context(|| format!("{} cannot be written", path.display()))
            }
        }
    }

    /// For people.
    pub(super) fn name(&self) -> String {
        match self {
            Self::Stdout => "standard output".to_owned(),
            Self::Special(path) | Self::File { path, .. } => path.display().to_string(),
        }
    }
}

/// Opens something that exists for writing behind what it holds: what a shell redirected to may hold more.
fn append_to(path: &Path) -> std::io::Result<fs::File> {
    fs::OpenOptions::new().append(true).open(path)
}
