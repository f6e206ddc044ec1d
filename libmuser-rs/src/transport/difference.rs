// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Says in words which part of a description is not as it was before.

use super::Description;
use crate::region::{Area, Region};

/// The first part of a description that differs from an earlier one, by its position among its
/// kind. Where the earlier description goes on, the position is behind the last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Difference {
    Region(usize),
    /// Counted through all regions.
    Area(usize),
    Irq(usize),
}

impl Difference {
    /// How `later` differs from `earlier`.
    pub(crate) fn between(earlier: &Description, later: &Description) -> Option<Self> {
        let regions = |description: &Description| -> Vec<_> {
            let regions = description.regions.iter();
            let told = regions.map(|region| {
                let access = (region.readable, region.writable);
                (region.index, region.size, access, region.areas.len())
            });
            told.collect()
        };
        let areas = |description: &Description| -> Vec<Area> {
            let regions = description.regions.iter();
            regions.flat_map(|region| &region.areas).copied().collect()
        };
        first(&regions(earlier), &regions(later))
            .map(Self::Region)
            .or_else(|| first(&areas(earlier), &areas(later)).map(Self::Area))
            .or_else(|| first(&earlier.irqs, &later.irqs).map(Self::Irq))
    }

    /// A sentence for the server that gave `later`.
    pub(crate) fn sentence(self, later: &Description) -> String {
        let (name, what) = match self {
            Self::Region(position) => (
                later
                    .regions
                    .get(position)
                    .map(|region| region_name(region.index)),
                ("another size, access or number of areas", "regions"),
            ),
            Self::Area(position) => (
                name_area(later, position),
                ("another place, size or kind", "areas"),
            ),
            Self::Irq(position) => (
                later
                    .irqs
                    .get(position)
                    .map(|irq| format!("interrupt index {}", irq.index)),
                ("another number or kind of vectors", "interrupt indexes"),
            ),
        };
        let remedy = "; remove the device and create it again";
        match name {
            Some(name) => {
                let (other, _) = what;
                format!("{name} was described with {other} before, or not at all{remedy}")
            }
            None => format!("it was described with more {} before{remedy}", what.1),
        }
    }
}

/// The position of the first element that differs.
fn first<T: PartialEq>(earlier: &[T], later: &[T]) -> Option<usize> {
    let both = earlier.len().min(later.len());
    let within = (0..both).find(|position| earlier[*position] != later[*position]);
    within.or_else(|| (earlier.len() != later.len()).then_some(both))
}

/// A region as PCI names it.
pub(super) fn region_name(index: u32) -> String {
    Region::from_index(index).map_or_else(|| format!("region {index}"), |region| region.to_string())
}

/// Names an area by its number in its region, where the position counts those of all regions.
pub(super) fn name_area(description: &Description, position: usize) -> Option<String> {
    let mut number = position;
    for region in &description.regions {
        match region.areas.get(number) {
            Some(Area { offset, .. }) => {
                let region = region_name(region.index);
                return Some(format!("{region}: area {number} at {offset:#x}"));
            }
            None => number -= region.areas.len(),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Bar, Msix, PciBuilder};

    fn with_bar(bar: Bar) -> Description {
        let builder = PciBuilder::new(1, 2).bar(0, Bar::memory32(0x1000).mappable(0..0x1000));
        let builder = builder.bar(1, Bar::memory32(0x1000)).bar(2, bar);
        let builder = builder.msix(Msix::new(4).table(1, 0).pba(1, 0x800));
        builder.build().unwrap().description().clone()
    }

    fn sentence_of(earlier: &Description, later: &Description) -> String {
        let difference = Difference::between(earlier, later).unwrap();
        difference.sentence(later)
    }

    fn starts(text: &str, start: &str) {
        assert!(text.starts_with(start), "{text}");
    }

    #[test]
    fn part_that_differs_is_named() {
        let one = with_bar(Bar::memory32(0x4000).mappable(0x1000..0x2000));
        let larger = with_bar(Bar::memory32(0x8000).mappable(0x1000..0x2000));
        let moved = with_bar(Bar::memory32(0x4000).mappable(0x2000..0x3000));
        let more = with_bar(
            Bar::memory32(0x4000)
                .mappable(0..0x1000)
                .mappable(0x1000..0x2000),
        );
        let mut vectors = one.clone();
        vectors.irqs.last_mut().unwrap().count += 1;
        let mut without = one.clone();
        let index = without.irqs.pop().unwrap().index;

        assert_eq!(Difference::between(&one, &one.clone()), None);
        starts(
            &sentence_of(&one, &larger),
            "BAR 2 was described with another size",
        );
        starts(
            &sentence_of(&one, &more),
            "BAR 2 was described with another size",
        );
        let area = "BAR 2: area 0 at 0x2000 was described with another place";
        starts(&sentence_of(&one, &moved), area);
        let last = one.irqs.len() - 1;
        let irq = Some(Difference::Irq(last));
        assert_eq!(Difference::between(&one, &vectors), irq);
        let irq = format!("interrupt index {index} was described with another number");
        starts(&sentence_of(&without, &one), &irq);
        starts(
            &sentence_of(&one, &without),
            "it was described with more interrupt",
        );
    }

    #[test]
    fn position_out_of_range_does_not_panic() {
        let description = with_bar(Bar::memory32(0x4000));
        for difference in [Difference::Region, Difference::Area, Difference::Irq] {
            let text = difference(usize::MAX).sentence(&description);
            assert!(text.contains("more"), "{text}");
        }
    }
}
