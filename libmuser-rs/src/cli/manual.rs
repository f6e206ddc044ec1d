// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One text for `--help` and for the manual page.
//!
//! A program writes its sections once. `--help` ends with them; [`page`] makes a manual page of
//! them and of the options that clap knows.

use std::io;

use clap::Command;
use clap_mangen::roff::{bold, roman, Roff};
use clap_mangen::Man;

/// A section: its title, and its text.
///
/// In the text, what begins with spaces is shown as it is, such as a command or a table; the rest
/// is paragraphs, between empty lines.
pub type Section<'a> = (&'a str, &'a str);

/// The sections as `--help` ends with them.
#[must_use]
pub fn help(sections: &[Section<'_>]) -> String {
    let section = |(title, text): &Section<'_>| {
        let lines = text.trim_end().lines().map(|line| match line {
            "" => String::new(),
            line => format!("  {line}"),
        });
        let lines: Vec<_> = lines.collect();
        format!("{title}\n{}", lines.join("\n"))
    };
    let sections: Vec<_> = sections.iter().map(section).collect();
    sections.join("\n\n")
}

/// The manual page of a program, or of one of its subcommands: what clap knows, the sections, and
/// other pages, which are given as `muserctl(1)`.
///
/// # Errors
///
/// None that writing to memory has.
pub fn page(command: Command, sections: &[Section<'_>], see_also: &[&str]) -> io::Result<Vec<u8>> {
    // The sections stand below in their own right.
    let command = command
        .after_help(None::<&str>)
        .after_long_help(None::<&str>)
        .disable_help_subcommand(true);
    let has_subcommands = command.get_subcommands().any(|sub| !sub.is_hide_set());
    let man = Man::new(command).manual("muser").source("muser");
    let mut page = b".\\\" SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause\n".to_vec();
    man.render_title(&mut page)?;
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    man.render_options_section(&mut page)?;
    if has_subcommands {
        man.render_subcommands_section(&mut page)?;
    }
    let mut roff = Roff::default();
    for (title, text) in sections {
        roff.control("SH", [*title]);
        body(&mut roff, text);
    }
    if !see_also.is_empty() {
        roff.control("SH", ["SEE ALSO"]);
        let mut line = Vec::new();
        for (number, other) in see_also.iter().enumerate() {
            if number > 0 {
                line.push(roman(", "));
            }
            let (name, section) = other.split_once('(').unwrap_or((other, "1)"));
            line.push(bold(name));
            line.push(roman(format!("({section}")));
        }
        roff.text(line);
    }
    roff.to_writer(&mut page)?;
    Ok(page)
}

/// Paragraphs, and between them what is shown as it is.
fn body(roff: &mut Roff, text: &str) {
    let mut verbatim = false;
    let mut begins = true;
    for line in text.trim_end().lines() {
        let shown = line.starts_with(' ');
        if shown != verbatim && !line.is_empty() {
            let controls: [(&str, &[&str]); 2] = match shown {
                true => [("RS", &["4"]), ("nf", &[])],
                false => [("fi", &[]), ("RE", &[])],
            };
            for (name, arguments) in controls {
                roff.control(name, arguments.iter().copied());
            }
            verbatim = shown;
        }
        match line {
            "" => begins = true,
            line => {
                if begins {
                    // A line of nothing in what is shown; the start of a paragraph elsewhere.
                    roff.control(if verbatim { "sp" } else { "PP" }, []);
                }
                begins = false;
                roff.text([roman(line.trim_start())]);
            }
        }
    }
    if verbatim {
        roff.control("fi", []);
        roff.control("RE", []);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text_of(sections: &[Section<'_>]) -> String {
        let command = Command::new("thing").version("1").about("Does things");
        String::from_utf8(page(command, sections, &["muserctl(1)"]).unwrap()).unwrap()
    }

    #[test]
    fn page_has_the_sections_in_their_order() {
        let text = text_of(&[("EXIT STATUS", "0 done"), ("FILES", "none")]);

        let titles = text.lines().filter_map(|line| line.strip_prefix(".SH "));
        let titles: Vec<_> = titles.map(|title| title.trim_matches('"')).collect();
        let expected = "NAME SYNOPSIS DESCRIPTION OPTIONS,EXIT STATUS,FILES,SEE ALSO";
        assert_eq!(
            titles.join(" ").replace(' ', ""),
            expected.replace([' ', ','], "")
        );
    }

    #[test]
    fn what_is_indented_is_shown_as_it_is() {
        let text = text_of(&[("EXAMPLES", "Serve:\n\n    gpio --uuid X\n\nThat is it.")]);

        let shown = text
            .split_once(".nf\n")
            .unwrap()
            .1
            .split_once(".fi")
            .unwrap()
            .0;
        assert!(shown.contains("gpio \\-\\-uuid X"), "{shown}");
        assert!(text.contains("That is it."));
    }

    #[test]
    fn line_that_starts_like_a_control_is_text() {
        let text = text_of(&[("FILES", ".config\n'quoted'")]);

        assert!(!text.lines().any(|line| line.starts_with(".config")));
        assert!(!text.lines().any(|line| line.starts_with('\'')));
    }

    #[test]
    fn help_has_the_same_text() {
        let text = help(&[("FILES", "one\n\n  two"), ("MORE", "three")]);

        assert_eq!(text, "FILES\n  one\n\n    two\n\nMORE\n  three");
    }
}
