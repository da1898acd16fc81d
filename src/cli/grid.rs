//! Lines of columns with numbers and bars, in colour where that is wanted.

use super::ui::{Tone, Ui};

/// The characters a text takes on the terminal.
pub(super) fn width(text: &str) -> usize {
    text.chars().count()
}

/// A text that is cut to `room` characters, and shows that it was.
pub(super) fn cut(text: &str, room: usize) -> String {
    if width(text) <= room {
        return text.to_owned();
    }
    let kept = text.chars().take(room.saturating_sub(1));
    kept.chain((room > 0).then_some('…')).collect()
}

/// A text in its column.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Cell {
    /// Escapes count as nothing.
    text: String,
    before: usize,
    after: usize,
}

impl Cell {
    pub(super) fn left(text: &str, room: usize) -> Self {
        Self {
            text: text.to_owned(),
            before: 0,
            after: room.saturating_sub(width(text)),
        }
    }

    pub(super) fn right(text: &str, room: usize) -> Self {
        Self {
            text: text.to_owned(),
            before: room.saturating_sub(width(text)),
            after: 0,
        }
    }

    pub(super) fn bar(ui: Ui, bar: &Bar) -> Self {
        let (dark, light) = bar.parts();
        let after = bar.width.saturating_sub(width(&dark) + width(&light));
        Self {
            text: ui.paint_some(Tone::Warning, &dark) + &ui.paint_some(Tone::Faint, &light),
            before: 0,
            after,
        }
    }

    pub(super) fn painted(mut self, ui: Ui, tone: Option<Tone>) -> Self {
        if let Some(tone) = tone {
            self.text = ui.paint_some(tone, &self.text);
        }
        self
    }

    /// A line of cells; nothing follows the last that isn't empty.
    pub(super) fn join(cells: &[Self], gap: &str) -> String {
        let last = cells.iter().rposition(|cell| !cell.text.is_empty());
        let mut line = String::new();
        for (at, cell) in cells[..last.map_or(0, |last| last + 1)].iter().enumerate() {
            if at > 0 {
                line.push_str(gap);
            }
            line.push_str(&" ".repeat(cell.before));
            line.push_str(&cell.text);
            if Some(at) != last {
                line.push_str(&" ".repeat(cell.after));
            }
        }
        line
    }
}

/// Two parts of a whole.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bar {
    pub(super) dark: u64,
    pub(super) light: u64,
    /// What fills all of the width.
    pub(super) full: u64,
    pub(super) width: usize,
    pub(super) unicode: bool,
}

impl Bar {
    /// Steps of a character: from one eighth to all of it.
    const EIGHTHS: [char; 8] = ['▏', '▎', '▍', '▌', '▋', '▊', '▉', '█'];

    /// What isn't nothing shows, if only as the thinnest line.
    fn parts(&self) -> (String, String) {
        if self.full == 0 {
            return Default::default();
        }
        let steps = if self.unicode { 8 } else { 1 };
        let room = u128::try_from(self.width * steps).unwrap_or(0);
        let scaled = |bytes: u64| -> usize {
            let part =
                (u128::from(bytes) * room + u128::from(self.full) / 2) / u128::from(self.full);
            usize::try_from(part.min(room)).unwrap_or(0)
        };
        let dark = scaled(self.dark).max(usize::from(self.dark > 0));
        let whole = scaled(self.dark.saturating_add(self.light)).max(dark);
        let (blocks, rest) = (dark / steps, dark % steps);
        let mut text = if self.unicode { "█" } else { "#" }.repeat(blocks);
        if rest > 0 {
            text.push(Self::EIGHTHS[rest - 1]);
        }
        let light = whole.div_ceil(steps).saturating_sub(width(&text));
        (text, if self.unicode { "░" } else { "-" }.repeat(light))
    }
}

#[cfg(test)]
mod tests {
    use clap::ColorChoice;

    use super::*;

    fn shown(dark: u64, light: u64, unicode: bool) -> String {
        let bar = Bar {
            dark,
            light,
            full: 1000,
            width: 10,
            unicode,
        };
        let (dark, light) = bar.parts();
        dark + &light
    }

    #[test]
    fn a_bar_shows_both_parts_and_the_smallest_too() {
        for (dark, light, unicode, bar) in [
            (0, 0, true, ""),
            (1, 999, true, "▏░░░░░░░░░"),
            (500, 500, true, "█████░░░░░"),
            (512, 0, true, "█████▏"),
            (0, 300, true, "░░░"),
            (1000, 1000, true, "██████████"),
            (1, 999, false, "#---------"),
            (512, 0, false, "#####"),
        ] {
            assert_eq!(shown(dark, light, unicode), bar, "{dark} {light}");
        }
        let none = Bar {
            dark: 0,
            light: 0,
            full: 0,
            width: 10,
            unicode: true,
        };
        assert_eq!(none.parts(), (String::new(), String::new()));
    }

    #[test]
    fn numbers_end_below_each_other_and_lines_with_their_text() {
        let plain = Ui::new(ColorChoice::Never, false, false);
        let line = |name: &str, number: &str, rest: &str| {
            let cells = [
                Cell::left(name, 5),
                Cell::right(number, 4).painted(plain, Some(Tone::Strong)),
                Cell::left(rest, 6),
            ];
            Cell::join(&cells, " ")
        };
        assert_eq!(line("a", "1", "x"), "a        1 x");
        assert_eq!(line("b", "1000", ""), "b     1000");
        let colour = Ui::new(ColorChoice::Always, false, false);
        let cell = Cell::right("1", 4).painted(colour, Some(Tone::Strong));
        assert_eq!(
            Cell::join(&[cell, Cell::left("x", 0)], " "),
            "   \x1b[1m1\x1b[0m x"
        );
    }

    #[test]
    fn a_cut_text_says_so() {
        assert_eq!(cut("feature/login", 13), "feature/login");
        assert_eq!(cut("feature/login", 8), "feature…");
        assert_eq!(cut("ab", 0), "");
    }
}
