//! Names of backing files: what a recorded name means, and how to record one.
//!
//! A relative name means: relative to the folder of the image whose header holds it. `file:` in front says "a local file"
//! and nothing else; another word with a colon in front is a protocol (as in QEMU, a file whose own name looks like that is
//! written `./name`).

use std::path::{Component, Path, PathBuf};

/// A name taken apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Name<'a> {
    /// A path.
    Local(&'a str),
    /// Something with a protocol in front: `nbd`, `https`, `json`.
    Remote(&'a str),
}

/// Takes a name apart.
pub(crate) fn parse(name: &str) -> Name<'_> {
    let Some((protocol, rest)) = name.split_once(':') else { return Name::Local(name) };
    if protocol == "file" {
        return Name::Local(rest);
    }
    let is_word = protocol.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.' | '_'));
    if protocol.is_empty() || !is_word { Name::Local(name) } else { Name::Remote(protocol) }
}

/// The path that the local name `name` stands for when the image `referrer` holds it.
pub(crate) fn resolve(name: &str, referrer: Option<&str>) -> PathBuf {
    let path = Path::new(name);
    match referrer.map(parse) {
        Some(Name::Local(referrer)) if path.is_relative() => folder(referrer).join(path),
        _ => path.to_owned(),
    }
}

/// The folder of a path, possibly empty (the current one).
fn folder(path: &str) -> &Path {
    Path::new(path).parent().unwrap_or(Path::new(""))
}

/// Whether both images lie in the same folder as far as their names tell: then a name recorded in one means the same in the
/// other.
pub(crate) fn same_folder(a: &str, b: &str) -> bool {
    match (parse(a), parse(b)) {
        (Name::Local(a), Name::Local(b)) => folder(a) == folder(b),
        _ => false,
    }
}

/// How the image `top` should name the file `target` (both names as opened, relative to the current folder): relative
/// where `target` is no absolute path itself. Looks at the file system, so that `..` and symbolic links come out right.
pub(crate) fn express(target: &str, top: &str) -> String {
    let (Name::Local(target), Name::Local(top)) = (parse(target), parse(top)) else { return target.to_owned() };
    let target = Path::new(target);
    let (Some(file), Some(from)) = (target.file_name(), real_folder(Path::new(top))) else {
        return recordable(target.to_string_lossy().into_owned());
    };
    let Some(to) = real_folder(target) else { return recordable(target.to_string_lossy().into_owned()) };
    recordable(relative(&to, &from).join(file).to_string_lossy().into_owned())
}

/// The folder a path lies in, absolute, symbolic links followed where it exists.
fn real_folder(path: &Path) -> Option<PathBuf> {
    let folder = match path.parent() {
        Some(folder) if folder.as_os_str().is_empty() => Path::new("."),
        Some(folder) => folder,
        None => return None,
    };
    folder.canonicalize().or_else(|_| std::path::absolute(folder)).ok()
}

/// The way from folder `from` to folder `to`, both absolute.
fn relative(to: &Path, from: &Path) -> PathBuf {
    let shared = to.components().zip(from.components()).take_while(|(a, b)| a == b).count();
    let up = from.components().skip(shared).map(|_| Component::ParentDir);
    up.chain(to.components().skip(shared)).collect()
}

/// Keeps a path from being taken for a protocol.
fn recordable(path: String) -> String {
    match parse(&path) {
        Name::Remote(_) => format!("./{path}"),
        Name::Local(_) => path,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_word_before_a_colon_is_a_protocol() {
        assert_eq!(parse("a.img"), Name::Local("a.img"));
        assert_eq!(parse("file:a.img"), Name::Local("a.img"));
        assert_eq!(parse("./a:b.img"), Name::Local("./a:b.img"));
        assert_eq!(parse("/x/a:b"), Name::Local("/x/a:b"));
        assert_eq!(parse("nbd://host/x"), Name::Remote("nbd"));
        assert_eq!(parse("json:{}"), Name::Remote("json"));
        assert_eq!(parse(":x"), Name::Local(":x"));
    }

    #[test]
    fn relative_names_start_at_the_folder_of_who_holds_them() {
        assert_eq!(resolve("b.img", Some("dir/a.qed")), Path::new("dir/b.img"));
        assert_eq!(resolve("b.img", Some("a.qed")), Path::new("b.img"));
        assert_eq!(resolve("/b.img", Some("dir/a.qed")), Path::new("/b.img"));
        assert_eq!(resolve("b.img", None), Path::new("b.img"));
        assert_eq!(resolve("b.img", Some("file:dir/a.qed")), Path::new("dir/b.img"));
    }

    #[test]
    fn a_name_is_expressed_from_the_folder_of_the_top() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        std::fs::create_dir_all(root.join("vm/deep")).unwrap();
        std::fs::create_dir_all(root.join("base")).unwrap();
        std::os::unix::fs::symlink(root.join("vm/deep"), root.join("link")).unwrap();
        let name = |path: &str| root.join(path).to_string_lossy().into_owned();
        assert_eq!(express(&name("base/b.img"), &name("vm/a.qed")), "../base/b.img");
        assert_eq!(express(&name("vm/b.img"), &name("vm/a.qed")), "b.img");
        assert_eq!(express(&name("vm/deep/b.img"), &name("vm/a.qed")), "deep/b.img");
        assert_eq!(express(&name("base/b.img"), &name("link/a.qed")), "../../base/b.img");
        assert_eq!(express(&name("vm/b:c.img"), &name("vm/a.qed")), "./b:c.img");
        assert_eq!(express("https://host/b.img", &name("vm/a.qed")), "https://host/b.img");
    }
}
