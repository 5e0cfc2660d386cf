//! Text from anywhere, made fit to be drawn: nothing that a terminal obeys, that XML reads as markup or refuses, that turns the
//! direction of what follows, or that fills the page.

/// The longest name that is drawn, in characters.
const LONGEST: usize = 48;
/// The longest text that is written on a page.
const LONGEST_TEXT: usize = 2000;

/// `text` as one short line of visible characters.
pub(super) fn clean(text: &str) -> String {
    cut(text, LONGEST)
}

fn cut(text: &str, longest: usize) -> String {
    let mut line: String = text.chars().take(longest).map(|c| if is_drawn(c) { c } else { '\u{fffd}' }).collect();
    if text.chars().nth(longest).is_some() {
        line.push('…');
    }
    line
}

/// As [`clean`], in ASCII.
pub(super) fn clean_ascii(text: &str) -> String {
    clean(text).chars().map(|c| if c.is_ascii() { c } else { '?' }).collect()
}

/// As [`clean`], for text and attributes of XML.
pub(super) fn clean_xml(text: &str) -> String {
    escape(&clean(text))
}

/// A sentence as text of XML or HTML.
pub(super) fn sentence_xml(text: &str) -> String {
    escape(&cut(text, LONGEST_TEXT))
}

fn escape(text: &str) -> String {
    let mut escaped = String::new();
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            other => escaped.push(other),
        }
    }
    escaped
}

/// Whether a character is drawn where it stands and nothing else. Marks that change direction or join lines, and characters
/// that XML 1.0 does not know, are not.
fn is_drawn(c: char) -> bool {
    !(c.is_control()
        || matches!(c, '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}')
        || matches!(c, '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{fffe}' | '\u{ffff}' | '\u{e0000}'..='\u{e007f}'))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_cannot_draw_anything_else() {
        assert_eq!(clean_xml("</text><script>\"'&"), "&lt;/text&gt;&lt;script&gt;&quot;&#39;&amp;");
        assert_eq!(clean("a\u{1b}[2J\u{202e}b\n"), "a\u{fffd}[2J\u{fffd}b\u{fffd}");
        assert_eq!(clean_ascii("é\u{7}x"), "??x");
        assert_eq!(clean(&"x".repeat(100)).chars().count(), LONGEST + 1);
    }

    proptest! {
        #[test]
        fn no_name_leaves_its_place(text in ".*") {
            let xml = clean_xml(&text);
            prop_assert!(!xml.contains(['<', '>', '"', '\'']) && !xml.chars().any(char::is_control));
            let sentence = sentence_xml(&text);
            prop_assert!(!sentence.contains(['<', '>', '"', '\'']) && !sentence.chars().any(char::is_control));
            prop_assert!(clean_ascii(&text).bytes().all(|b| (0x20..0x7f).contains(&b)));
        }
    }
}
