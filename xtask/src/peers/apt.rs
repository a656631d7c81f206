//! Installing from the machine's own Debian package sources.
//!
//! No host and no key is written here: where a newer suite is needed (QEMU on Debian 12 comes from backports) the
//! mirror and its keyring are those of the suite already configured.

use std::fs;
use std::path::Path;

use crate::workspace::{Doing, Failure, Outcome, Run, find_program};

const SOURCES_LIST: &str = "/etc/apt/sources.list";
const SOURCES_PARTS: &str = "/etc/apt/sources.list.d";
const OUR_SOURCE: &str = "/etc/apt/sources.list.d/headwater-backports.sources";

/// Another package manager at work is waited for, this many seconds.
const LOCK_TIMEOUT: &str = "DPkg::Lock::Timeout=300";

/// Whether this machine is one we install on: Debian, and we are root. The error says what it lacks.
pub(crate) fn can_install() -> Result<(), &'static str> {
    if os_release("ID").as_deref() != Some("debian") || find_program("apt-get").is_none() {
        return Err("this is not Debian");
    }
    let ours = fs::metadata("/proc/self").map(|meta| std::os::unix::fs::MetadataExt::uid(&meta));
    match ours {
        Ok(0) => Ok(()),
        _ => Err("only root may install packages"),
    }
}

fn os_release(key: &str) -> Option<String> {
    let text = fs::read_to_string("/etc/os-release").ok()?;
    text.lines().find_map(|line| {
        let value = line.strip_prefix(key)?.strip_prefix('=')?;
        Some(value.trim_matches('"').to_owned())
    })
}

fn apt_get() -> Run {
    Run::new("apt-get")
        .env("DEBIAN_FRONTEND", "noninteractive")
        .args(["--quiet=2", "--option", LOCK_TIMEOUT])
        .args(["--option", "Dpkg::Use-Pty=0"])
}

pub(crate) fn update() -> Outcome {
    apt_get().arg("update").run()
}

/// Installs `packages`, from `release` if one is named. Nothing to install is success.
pub(crate) fn install(packages: &[&str], release: Option<&str>) -> Outcome {
    if packages.is_empty() {
        return Ok(());
    }
    let mut run = apt_get().args(["install", "--yes", "--no-install-recommends"]);
    if let Some(release) = release {
        run = run.args(["--target-release", release]);
    }
    run.args(packages).run()
}

/// Installs `packages`, which must be of one version, from the configured suites if all are there at `at_least` or
/// later, else from the backports of the running release.
///
/// All are looked at: one that is already installed from backports keeps its version as its candidate, while the
/// configured suite would add its old companions and remove it.
pub(crate) fn install_together(packages: &[&str], at_least: u32) -> Outcome {
    let enough = |version: Option<u32>| version.is_some_and(|version| version >= at_least);
    if all(packages, |package| Ok(enough(candidate(package)?)))? {
        return install(packages, None);
    }
    let codename =
        os_release("VERSION_CODENAME").ok_or_else(|| Failure::new("/etc/os-release states no VERSION_CODENAME"))?;
    let backports = format!("{codename}-backports");
    if !all(packages, |package| Ok(enough(newest(package)?)))? {
        add_backports(&codename, &backports)?;
        update()?;
    }
    install(packages, Some(&backports))
}

fn all(packages: &[&str], mut holds: impl FnMut(&str) -> Outcome<bool>) -> Outcome<bool> {
    for package in packages {
        if !holds(package)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The major version apt would install unasked.
fn candidate(package: &str) -> Outcome<Option<u32>> {
    let policy = Run::new("apt-cache").args(["policy", package]).env("LC_ALL", "C").read()?;
    Ok(policy.lines().find_map(|line| major(line.trim().strip_prefix("Candidate:")?)))
}

/// The newest major version any configured suite delivers; what merely happens to be installed does not count.
fn newest(package: &str) -> Outcome<Option<u32>> {
    let known = Run::new("apt-cache").args(["madison", package]).read()?;
    Ok(known.lines().filter_map(|line| major(line.split('|').nth(1)?)).max())
}

/// The major number of a Debian version: `1:10.0.2+ds-2` is 10.
fn major(version: &str) -> Option<u32> {
    let upstream = version.trim().rsplit(':').next()?;
    upstream.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

fn add_backports(codename: &str, backports: &str) -> Outcome {
    let source = configured_sources()?
        .into_iter()
        .find(|source| source.suites.iter().any(|suite| suite == codename))
        .ok_or_else(|| {
        Failure::new(format!(
            "no apt source for {codename} is configured, so none for {backports} can be derived; \
                 add {backports} to {SOURCES_PARTS} and run this again"
        ))
    })?;
    let mut lines = vec![
        "# Added by Headwater's `cargo xtask peers` for QEMU; nothing is upgraded from it unasked.".to_owned(),
        "Types: deb".to_owned(),
        format!("URIs: {}", source.uri),
        format!("Suites: {backports}"),
        "Components: main".to_owned(),
    ];
    lines.extend(source.signed_by.map(|keyring| format!("Signed-By: {keyring}")));
    eprintln!("peers: writing {OUR_SOURCE} ({backports} from the mirror of {codename})");
    fs::write(OUR_SOURCE, lines.join("\n") + "\n").doing(format!("writing {OUR_SOURCE}"))
}

/// What one entry of apt's source lists says, as far as we need it.
#[derive(Debug, PartialEq)]
struct Source {
    uri: String,
    suites: Vec<String>,
    signed_by: Option<String>,
}

fn configured_sources() -> Outcome<Vec<Source>> {
    let mut sources = Vec::new();
    if let Ok(text) = fs::read_to_string(SOURCES_LIST) {
        sources.extend(text.lines().filter_map(one_line_source));
    }
    if !Path::new(SOURCES_PARTS).is_dir() {
        return Ok(sources);
    }
    for entry in fs::read_dir(SOURCES_PARTS).doing(format!("listing {SOURCES_PARTS}"))? {
        let path = entry.doing(format!("listing {SOURCES_PARTS}"))?.path();
        let text = || fs::read_to_string(&path).doing(format!("reading {}", path.display()));
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("sources") => sources.extend(stanza_sources(&text()?)),
            Some("list") => sources.extend(text()?.lines().filter_map(one_line_source)),
            _ => {}
        }
    }
    Ok(sources)
}

/// `deb [signed-by=KEYRING] URI SUITE COMPONENT…`
fn one_line_source(line: &str) -> Option<Source> {
    let rest = line.trim().strip_prefix("deb ")?.trim_start();
    let (options, rest) = match rest.strip_prefix('[') {
        Some(bracketed) => bracketed.split_once(']')?,
        None => ("", rest),
    };
    let mut words = rest.split_whitespace();
    Some(Source {
        uri: words.next()?.to_owned(),
        suites: vec![words.next()?.to_owned()],
        signed_by: options.split_whitespace().find_map(|option| option.strip_prefix("signed-by=")).map(str::to_owned),
    })
}

/// The stanzas of a deb822 `.sources` file. A keyring that is spelt out in the file instead of named is left away:
/// apt then trusts its own, as it does for the suite itself.
fn stanza_sources(text: &str) -> Vec<Source> {
    let mut stanzas: Vec<Vec<&str>> = vec![Vec::new()];
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        if line.trim().is_empty() {
            stanzas.push(Vec::new());
        } else if let Some(stanza) = stanzas.last_mut() {
            stanza.push(line);
        }
    }
    let field = |stanza: &[&str], name: &str| {
        stanza.iter().find_map(|line| {
            let (key, value) = line.split_once(':')?;
            key.eq_ignore_ascii_case(name).then(|| value.trim().to_owned())
        })
    };
    stanzas
        .iter()
        .filter(|stanza| field(stanza, "Types").is_some_and(|types| types.contains("deb")))
        .filter(|stanza| field(stanza, "Enabled").is_none_or(|enabled| enabled != "no"))
        .filter_map(|stanza| {
            Some(Source {
                uri: field(stanza, "URIs")?.split_whitespace().next()?.to_owned(),
                suites: field(stanza, "Suites")?.split_whitespace().map(str::to_owned).collect(),
                signed_by: field(stanza, "Signed-By").filter(|keyring| keyring.starts_with('/')),
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(uri: &str, suites: &[&str], signed_by: Option<&str>) -> Source {
        Source {
            uri: uri.to_owned(),
            suites: suites.iter().map(ToString::to_string).collect(),
            signed_by: signed_by.map(str::to_owned),
        }
    }

    #[test]
    fn deb822_stanzas_are_read() {
        let text = "Types: deb\n# a comment\nURIs: http://mirror.example/debian\nSuites: bookworm bookworm-updates\n\
                    Components: main\nSigned-By: /usr/share/keyrings/archive.gpg\n\n\
                    Types: deb-src\nEnabled: no\nURIs: http://mirror.example/other\nSuites: x\n\n\
                    Types: deb\nURIs: http://mirror.example/inline\nSuites: sid\nSigned-By:\n -----BEGIN\n .\n";
        assert_eq!(
            stanza_sources(text),
            [
                source(
                    "http://mirror.example/debian",
                    &["bookworm", "bookworm-updates"],
                    Some("/usr/share/keyrings/archive.gpg")
                ),
                source("http://mirror.example/inline", &["sid"], None),
            ]
        );
    }

    #[test]
    fn one_line_entries_are_read() {
        assert_eq!(
            one_line_source("deb [arch=amd64 signed-by=/k.gpg] http://mirror.example/debian trixie main"),
            Some(source("http://mirror.example/debian", &["trixie"], Some("/k.gpg")))
        );
        assert_eq!(
            one_line_source("deb http://mirror.example/debian trixie main"),
            Some(source("http://mirror.example/debian", &["trixie"], None))
        );
        assert_eq!(one_line_source("# deb http://mirror.example/debian trixie"), None);
        assert_eq!(one_line_source("deb-src http://mirror.example/debian trixie"), None);
    }

    #[test]
    fn major_numbers_of_debian_versions() {
        assert_eq!(major(" 1:10.0.2+ds-2+deb13u1~bpo12+1 "), Some(10));
        assert_eq!(major("7.2+dfsg-7"), Some(7));
        assert_eq!(major("(none)"), None);
    }
}
