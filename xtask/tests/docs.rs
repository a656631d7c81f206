//! What the documentation names is there: every `` `path` `` of this repository and every `` `path.rs: test` ``.

use std::fs;
use std::path::Path;

/// Pages that name tests.
const PAGES: [&str; 2] = ["docs/guarantees.md", "docs/pitfalls.md"];

#[test]
fn every_test_that_is_named_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut named = 0;
    for page in PAGES {
        let text = fs::read_to_string(root.join(page)).unwrap();
        for code in text.split('`').skip(1).step_by(2) {
            let (path, tests) = code.split_once(": ").unwrap_or((code, ""));
            let of_this_repository =
                ["crates/", "tests/", "sim/", "fuzz/", "xtask/"].iter().any(|top| path.starts_with(top));
            if !of_this_repository || path.contains('*') {
                continue;
            }
            let found = root.join(path);
            assert!(found.exists(), "{page}: there is no {path}");
            let source = if found.is_file() { fs::read_to_string(&found).unwrap() } else { String::new() };
            for test in tests.split(", ").filter(|test| !test.is_empty()) {
                named += 1;
                assert!(source.contains(&format!("fn {test}(")), "{page}: {path} has no test {test}");
            }
        }
    }
    assert!(named > 100, "only {named} tests were found: has the way of naming them changed?");
}
