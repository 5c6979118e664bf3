//! The configs of `examples/`.

use std::fs;
use std::path::Path;

use unisono_train::RunConfig;

#[test]
fn every_example_is_valid() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples");
    let paths =
        fs::read_dir(folder).expect("the folder is there").map(|entry| entry.expect("an entry").path());
    let mut seen = 0;
    for path in paths.filter(|path| path.extension().is_some_and(|extension| extension == "toml")) {
        let text = fs::read_to_string(&path).expect("text");
        let config =
            RunConfig::load(&text, &[]).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let written = config.to_toml().expect("it has a TOML form");
        assert_eq!(RunConfig::load(&written, &[]).expect("written configs are valid"), config);
        seen += 1;
    }
    assert!(seen >= 3, "{seen} examples");
}
