use std::cmp::Reverse;
use std::env;

use crate::api::types::{BranchUsage, Request, SharerKind, UsageInfo};
use crate::cli::context::Context;
use crate::cli::grid::{self, Bar, Cell};
use crate::cli::render;
use crate::cli::report::{ExitStatus, Report};
use crate::cli::ui::{Tone, Ui};

const EXAMPLES: &str = "\
Examples:
  dbranch usage
  dbranch usage --sort size
  dbranch usage --json | jq '.branches[] | {name, freed_by_delete_bytes}'";

/// Tell what each branch takes on disk, and what deleting it would free
///
/// The numbers are the file system's own. What was written within the last half
/// minute may have no place on disk yet, and isn't counted then.
///
/// SIZE         all files of the branch, as if it shared nothing
///
/// OWN          data that only this branch has
///
/// SHARED       what others hold too; on disk once, whoever has it
///
/// FREED        what deleting it for good would free: OWN, and what the file
///              system keeps beside it of extents that are used in part
///
/// bar          the dark part is OWN, the light part SHARED, of the largest branch
///
/// SHARED WITH  who holds the most of it too; + and a number: so many more
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES, verbatim_doc_comment)]
pub(crate) struct Args {
    /// What to order by; numbers from the largest down
    #[arg(long, value_enum, default_value_t = Sort::Freed)]
    sort: Sort,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Sort {
    /// What deleting would free
    Freed,
    /// Data of its own
    Own,
    /// What others hold too
    Shared,
    /// All files
    Size,
    /// The branch's name
    Name,
    /// Oldest first
    Age,
}

pub(crate) fn run(cx: &Context, args: &Args) -> Result<ExitStatus, Report> {
    let request = Request::Usage { at: cx.at()? };
    let mut usage: UsageInfo = cx.call_as(&request)?;
    sort(&mut usage.branches, args.sort);
    let ui = cx.ui;
    if ui.json {
        ui.answer_json(&usage)?;
        return Ok(ExitStatus::Done);
    }
    for line in lines(ui, &usage, &Room::here(ui)) {
        ui.answer(line)?;
    }
    let pool = &usage.pool;
    ui.status(format_args!(
        "pool: {} on {}, {} of {} free",
        pool.path.display(),
        pool.driver,
        render::bytes(pool.free_bytes),
        render::bytes(pool.total_bytes)
    ));
    for note in &usage.notes {
        ui.status(format_args!("note: {note}"));
    }
    Ok(ExitStatus::Done)
}

fn sort(branches: &mut [BranchUsage], by: Sort) {
    match by {
        Sort::Freed => {
            branches.sort_by_key(|b| Reverse((b.freed_by_delete_bytes, b.exclusive_bytes)));
        }
        Sort::Own => branches.sort_by_key(|b| Reverse(b.exclusive_bytes)),
        Sort::Shared => branches.sort_by_key(|b| Reverse(b.shared_bytes)),
        Sort::Size => branches.sort_by_key(|b| Reverse(b.logical_bytes)),
        Sort::Name => branches.sort_by(|a, b| a.name.as_str().cmp(b.name.as_str())),
        Sort::Age => {}
    }
}

/// What there is to write on.
#[derive(Debug, Clone, Copy)]
struct Room {
    /// In characters; none where lines may be as long as they like.
    width: Option<usize>,
    unicode: bool,
}

impl Room {
    fn here(ui: Ui) -> Self {
        // The first that is set wins (locale(7)).
        let locale = ["LC_ALL", "LC_CTYPE", "LANG"]
            .iter()
            .filter_map(|name| env::var(name).ok())
            .find(|value| !value.is_empty())
            .unwrap_or_default()
            .to_lowercase();
        Self {
            width: ui.width(),
            unicode: locale.contains("utf-8") || locale.contains("utf8"),
        }
    }
}

const HEADS: [&str; 5] = ["NAME", "SIZE", "OWN", "SHARED", "FREED"];
const GAP: &str = "  ";
/// No bar is longer, nor shorter than half of it.
const BAR: usize = 20;
/// Names get this much at least, then the bar, then who shares.
const NAME: usize = 16;
const WITH: usize = 14;
/// Where lines have no limit, so many sharers are named.
const NAMED: usize = 3;

fn lines(ui: Ui, usage: &UsageInfo, room: &Room) -> Vec<String> {
    let (trash, live): (Vec<_>, Vec<_>) = usage.branches.iter().partition(|b| b.trashed);
    let total = &usage.total;
    let bytes = |n: Option<u64>| n.map_or("?".to_owned(), render::bytes);
    let mut rows = vec![Row::of(HEADS.map(str::to_owned), Tone::Faint)];
    rows.extend(live.iter().map(|b| Row::branch(b, None)));
    if !trash.is_empty() {
        let mut of_all = Row::of(Default::default(), Tone::Faint);
        of_all.cells[0] = format!("in the trash ({}):", trash.len());
        of_all.cells[4] = bytes(usage.trash.freed_by_delete_bytes);
        rows.push(of_all);
        rows.extend(trash.iter().map(|b| Row::branch(b, Some(Tone::Faint))));
    }
    let all = [
        format!("all {}", usage.branches.len()),
        render::bytes(total.logical_bytes),
        render::bytes(total.exclusive_bytes),
        bytes(total.shared_bytes),
        bytes(total.freed_by_delete_bytes),
    ];
    rows.push(Row::of(all, Tone::Strong));
    let layout = Layout::new(&rows, room);
    let largest = usage
        .branches
        .iter()
        .map(|b| b.logical_bytes.max(b.exclusive_bytes + b.shared_bytes))
        .max()
        .unwrap_or(0);
    rows.iter()
        .map(|row| layout.line(ui, row, largest, room))
        .collect()
}

/// A line to be.
struct Row<'a> {
    cells: [String; 5],
    branch: Option<&'a BranchUsage>,
    tone: Option<Tone>,
}

impl<'a> Row<'a> {
    fn of(cells: [String; 5], tone: Tone) -> Self {
        Self {
            cells,
            branch: None,
            tone: Some(tone),
        }
    }

    fn branch(branch: &'a BranchUsage, tone: Option<Tone>) -> Self {
        let sizes = [
            branch.logical_bytes,
            branch.exclusive_bytes,
            branch.shared_bytes,
            branch.freed_by_delete_bytes,
        ]
        .map(render::bytes);
        let [size, own, shared, freed] = sizes;
        Self {
            cells: [branch.name.to_string(), size, own, shared, freed],
            branch: Some(branch),
            tone,
        }
    }

    fn is_head(&self) -> bool {
        self.cells[0] == HEADS[0] && self.branch.is_none()
    }
}

/// How wide the columns are.
struct Layout {
    widths: [usize; 5],
    bar: usize,
    /// 0 for no such column; none for as wide as need be.
    with: Option<usize>,
}

impl Layout {
    fn new(rows: &[Row<'_>], room: &Room) -> Self {
        let widest = |column: usize| {
            let cells = rows.iter().map(|row| grid::width(&row.cells[column]));
            cells.max().unwrap_or(0)
        };
        let mut widths = [0, 1, 2, 3, 4].map(widest);
        let Some(width) = room.width else {
            return Self {
                widths,
                bar: BAR / 2,
                with: None,
            };
        };
        let numbers: usize = widths[1..].iter().map(|w| w + GAP.len()).sum();
        let rest = width.saturating_sub(numbers);
        // Long names are cut before the bar and the sharers have to go.
        let wanted = BAR / 2 + WITH + 2 * GAP.len();
        let names = widths[0];
        widths[0] = names.min(rest.saturating_sub(wanted).max(NAME.min(rest)));
        let mut rest = rest.saturating_sub(widths[0]);
        let mut take = |least: usize, most: usize| {
            let got = rest.saturating_sub(GAP.len()).min(most);
            if got < least {
                return 0;
            }
            rest -= got + GAP.len();
            got
        };
        let bar = take(BAR / 2, BAR / 2);
        let sharers = take(WITH, usize::MAX);
        Self {
            widths,
            bar,
            with: Some(sharers),
        }
    }

    fn line(&self, ui: Ui, row: &Row<'_>, largest: u64, room: &Room) -> String {
        let mut cells: Vec<Cell> = row
            .cells
            .iter()
            .zip(self.widths)
            .enumerate()
            .map(|(column, (text, width))| match column {
                0 => Cell::left(&grid::cut(text, width), width),
                _ => Cell::right(text, width),
            })
            .map(|cell| cell.painted(ui, row.tone))
            .collect();
        if self.bar > 0 {
            cells.push(match row.branch {
                Some(branch) => Cell::bar(
                    ui,
                    &Bar {
                        dark: branch.exclusive_bytes,
                        light: branch.shared_bytes,
                        full: largest,
                        width: self.bar,
                        unicode: room.unicode,
                    },
                ),
                None => Cell::left("", self.bar),
            });
        }
        if self.with != Some(0) {
            let text = match row.branch {
                Some(branch) => sharers(branch, self.with),
                None if row.is_head() => grid::cut("SHARED WITH", self.with.unwrap_or(WITH)),
                None => String::new(),
            };
            cells.push(Cell::left(&text, 0).painted(ui, row.tone));
        }
        Cell::join(&cells, GAP)
    }
}

/// As many of those a branch shares with as have room, and how many more there are.
fn sharers(branch: &BranchUsage, width: Option<usize>) -> String {
    let Some(all) = &branch.shared_with else {
        return "not told".into();
    };
    let names: Vec<String> = all
        .iter()
        .map(|with| match with.kind {
            SharerKind::Branch => with.name.clone(),
            SharerKind::Trash => format!("{} (trash)", with.name),
            SharerKind::Other => format!("({})", with.name),
        })
        .collect();
    let some = |count: usize| {
        let more = names.len() - count + branch.shared_with_more;
        let first = names[..count].join(", ");
        match more {
            0 => first,
            _ if count == 0 => format!("{more} others"),
            _ => format!("{first} +{more}"),
        }
    };
    let most = names.len().min(NAMED);
    match width {
        None => some(most),
        Some(_) if names.is_empty() => String::new(),
        Some(width) => (1..=names.len())
            .rev()
            .map(&some)
            .find(|text| grid::width(text) <= width)
            .unwrap_or_else(|| grid::cut(&some(0), width)),
    }
}

#[cfg(test)]
mod tests {
    use clap::ColorChoice;

    use super::*;
    use crate::api::types::{PoolUsage, SharedWith, TrashUsage, UsageTotal};
    use crate::types::BranchName;

    const MIB: u64 = 1 << 20;

    fn branch(name: &str, own: u64, shared: u64, with: &[&str]) -> BranchUsage {
        BranchUsage {
            name: BranchName::new(name).unwrap(),
            logical_bytes: (own + shared) * MIB,
            exclusive_bytes: own * MIB,
            shared_bytes: shared * MIB,
            freed_by_delete_bytes: own * MIB,
            shared_with: Some(
                with.iter()
                    .map(|name| SharedWith {
                        name: (*name).to_owned(),
                        kind: SharerKind::Branch,
                        bytes: shared,
                    })
                    .collect(),
            ),
            shared_with_more: 0,
            trashed: false,
        }
    }

    fn usage() -> UsageInfo {
        let mut old = branch("old", 5, 800, &["main"]);
        old.trashed = true;
        UsageInfo {
            branches: vec![
                branch("main", 1, 900, &["feature/login", "b", "c", "d"]),
                branch("feature/login", 450, 450, &["main"]),
                old,
            ],
            total: UsageTotal {
                logical_bytes: 3 * 1024 * MIB,
                exclusive_bytes: 456 * MIB,
                shared_bytes: Some(900 * MIB),
                freed_by_delete_bytes: Some(1356 * MIB),
            },
            trash: TrashUsage {
                branches: 1,
                freed_by_delete_bytes: Some(5 * MIB),
            },
            pool: PoolUsage {
                driver: "btrfs".into(),
                path: "/pool".into(),
                total_bytes: 0,
                free_bytes: 0,
            },
            notes: Vec::new(),
        }
    }

    fn shown(usage: &UsageInfo, width: Option<usize>) -> Vec<String> {
        let ui = Ui::new(ColorChoice::Never, false, false);
        let room = Room {
            width,
            unicode: true,
        };
        lines(ui, usage, &room)
    }

    #[test]
    fn numbers_bars_and_names_stand_in_columns_and_the_trash_apart() {
        assert_eq!(
            shown(&usage(), None),
            [
                "NAME                    SIZE        OWN     SHARED      FREED              SHARED WITH",
                "main               901.0 MiB    1.0 MiB  900.0 MiB    1.0 MiB  ▏░░░░░░░░░  feature/login, b, c +1",
                "feature/login      900.0 MiB  450.0 MiB  450.0 MiB  450.0 MiB  █████░░░░░  main",
                "in the trash (1):                                     5.0 MiB",
                "old                805.0 MiB    5.0 MiB  800.0 MiB    5.0 MiB  ▏░░░░░░░░   main",
                "all 3                3.0 GiB  456.0 MiB  900.0 MiB    1.3 GiB",
            ]
        );
    }

    #[test]
    fn no_line_is_wider_than_the_terminal() {
        let line = &shown(&usage(), Some(94))[1];
        assert!(line.ends_with("feature/login, b +2"), "{line}");
        let mut usage = usage();
        usage.branches[1] = branch(&"x".repeat(200), 1, 1, &[&"y".repeat(200), "main"]);
        for width in 64..200 {
            for line in shown(&usage, Some(width)) {
                assert!(grid::width(&line) <= width, "{width}: {line}");
            }
        }
        let narrow = shown(&usage, Some(64));
        assert!(narrow[2].contains("xxx…"), "{narrow:?}");
    }

    #[test]
    fn what_the_file_system_does_not_tell_is_not_made_up() {
        let mut usage = usage();
        usage.branches[0].shared_with = None;
        usage.total.freed_by_delete_bytes = None;
        let lines = shown(&usage, None);
        assert!(lines[1].ends_with("not told"), "{lines:?}");
        assert!(lines[5].ends_with('?'), "{lines:?}");
    }

    #[test]
    fn the_largest_comes_first_whatever_is_asked_for() {
        let order = |by| {
            let mut branches = usage().branches;
            branches.pop();
            sort(&mut branches, by);
            branches[0].name.to_string()
        };
        assert_eq!(order(Sort::Freed), "feature/login");
        assert_eq!(order(Sort::Own), "feature/login");
        assert_eq!(order(Sort::Shared), "main");
        assert_eq!(order(Sort::Name), "feature/login");
        assert_eq!(order(Sort::Age), "main");
    }
}
