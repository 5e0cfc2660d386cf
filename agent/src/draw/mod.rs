//! Drawings: curves and maps of guest memory as tracking found them, as SVG and as text for terminals; a migration's report, as SVG and as a page.
//!
//! A mechanism that knows words and writes text; must not know where the numbers come from nor who looks. The SVG is written by hand:
//! one file must be readable on a light and on a dark page, which takes style sheet classes that change with the reader's colour
//! scheme, and plotting libraries fix each colour as they draw. Colours are told apart with every kind of colour
//! vision (Okabe and Ito; ColorBrewer), and never carry a meaning alone: curves differ in dashes and marks as well.
//!
//! Names of writers are the guest's words: see `label`.

mod curve;
mod heat;
mod label;
mod migration;
mod page;
mod scale;

pub use curve::{LINKS, curve_svg, curve_text};
pub use heat::{Estimated, heat_svg, heat_text};
pub use migration::migration_svg;
pub use page::migration_html;

/// What a drawing as text is made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Glyphs {
    /// Blocks and marks.
    #[default]
    Unicode,
    /// ASCII only, names included.
    Ascii,
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    /// Compares with the file of this name in `golden/`; with `UPDATE_GOLDEN` set, writes it instead. Look at what it wrote.
    pub(super) fn golden(name: &str, text: &str) {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/draw/golden").join(name);
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            std::fs::write(&path, text).unwrap();
        }
        let before = std::fs::read_to_string(&path).unwrap();
        assert!(before == text, "{name} is drawn otherwise; it is now:\n{text}");
    }
}
