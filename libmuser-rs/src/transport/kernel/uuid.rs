// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The name of a device.

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Result};

/// The name of a device: what was written to `create`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Uuid(String);

impl FromStr for Uuid {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let groups: Vec<&str> = text.split('-').collect();
        let lengths = groups.iter().map(|group| group.len());
        let digits = groups
            .iter()
            .all(|group| group.bytes().all(|b| b.is_ascii_hexdigit()));
        if !digits || !lengths.eq([8, 4, 4, 4, 12]) {
            let example = "c9abdcb5-5279-413a-9057-c81d2605ce9c";
            return Err(Error::model(format!(
                "`{text}` is not a UUID such as {example}"
            )));
        }
        Ok(Self(text.to_ascii_lowercase()))
    }
}

impl fmt::Display for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uuid_in_capitals_is_made_small() {
        let uuid: Uuid = "C9ABDCB5-5279-413A-9057-C81D2605CE9C".parse().unwrap();

        assert_eq!(uuid.to_string(), "c9abdcb5-5279-413a-9057-c81d2605ce9c");
    }

    #[test]
    fn text_that_is_no_uuid_is_refused() {
        for text in [
            "",
            "gpio",
            "c9abdcb5-5279-413a-9057-c81d2605ce9",
            "../../etc/passwd",
        ] {
            let error = text.parse::<Uuid>().unwrap_err();

            assert!(error.to_string().contains("not a UUID"), "{text}: {error}");
        }
    }
}
