//! Exact arithmetic for decimals: jq's own would make doubles of them.

use std::cmp::Ordering;

use jaq_core::ops::{Cmp, Math};
use jaq_json::{Num, Val};
use num_bigint::{BigInt, Sign};

/// Numbers with more digits than this are left to doubles.
const MOST_DIGITS: i64 = 2_000;
/// Digits after the point of a quotient that ends.
const QUOTIENT_DIGITS: u32 = 30;

/// `digits / 10^scale`.
#[derive(Clone, Debug)]
pub(super) struct Decimal {
    digits: BigInt,
    scale: i64,
}

impl Decimal {
    /// A number as JSON writes it; `None` for what is none, or is too long.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let (mantissa, exponent) = match text.find(['e', 'E']) {
            Some(at) => (&text[..at], text[at + 1..].parse::<i64>().ok()?),
            None => (text, 0),
        };
        let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
        let scale = (fraction.len() as i64).checked_sub(exponent)?;
        if mantissa.len() as i64 > MOST_DIGITS || scale.abs() > MOST_DIGITS {
            return None;
        }
        let digits: BigInt = format!("{whole}{fraction}").parse().ok()?;
        let mut number = Decimal { digits, scale };
        if scale < 0 {
            number = number.with_scale(0);
        }
        Some(number)
    }

    fn of(number: &Num) -> Option<Self> {
        match number {
            Num::Int(whole) => Some(Decimal { digits: BigInt::from(*whole), scale: 0 }),
            Num::BigInt(whole) if whole.bits() <= 32_000 => Some(Decimal { digits: (**whole).clone(), scale: 0 }),
            Num::Dec(text) => Decimal::parse(text),
            Num::BigInt(_) | Num::Float(_) => None,
        }
    }

    fn with_scale(self, scale: i64) -> Self {
        match scale - self.scale {
            0 => self,
            more => Decimal { digits: self.digits * ten_to(more.unsigned_abs() as u32), scale },
        }
    }

    fn same_scale(self, other: Self) -> (Self, Self) {
        let scale = self.scale.max(other.scale);
        (self.with_scale(scale), other.with_scale(scale))
    }

    pub(super) fn compare(&self, other: &Self) -> Ordering {
        let (one, other) = self.clone().same_scale(other.clone());
        one.digits.cmp(&other.digits)
    }

    /// The quotient, if it ends soon.
    fn divide(self, by: Self) -> Option<Self> {
        let (one, by) = self.same_scale(by);
        let scaled = one.digits * ten_to(QUOTIENT_DIGITS);
        let digits = &scaled / &by.digits;
        if &digits * &by.digits != scaled {
            return None;
        }
        let mut quotient = Decimal { digits, scale: i64::from(QUOTIENT_DIGITS) };
        let ten = BigInt::from(10);
        while quotient.scale > 0 {
            let shorter = &quotient.digits / &ten;
            if &shorter * &ten != quotient.digits {
                break;
            }
            quotient = Decimal { digits: shorter, scale: quotient.scale - 1 };
        }
        Some(quotient)
    }

    fn into_val(self) -> Val {
        if self.scale == 0 {
            return Val::Num(match isize::try_from(&self.digits) {
                Ok(whole) => Num::Int(whole),
                Err(_) => Num::big_int(self.digits),
            });
        }
        let sign = if self.digits.sign() == Sign::Minus { "-" } else { "" };
        let scale = self.scale as usize;
        let digits = format!("{:0>width$}", self.digits.magnitude(), width = scale + 1);
        let (whole, fraction) = digits.split_at(digits.len() - scale);
        Val::Num(Num::Dec(format!("{sign}{whole}.{fraction}").into()))
    }
}

fn ten_to(power: u32) -> BigInt {
    BigInt::from(10).pow(power)
}

/// `left op right` of two numbers, exact; `None` where jq's own arithmetic is right (doubles, division by zero).
pub(super) fn calculate(op: Math, left: &Num, right: &Num) -> Option<Val> {
    if let (Num::Int(left), Num::Int(right)) = (left, right) {
        let whole = match op {
            Math::Add => left.checked_add(*right),
            Math::Sub => left.checked_sub(*right),
            Math::Mul => left.checked_mul(*right),
            Math::Div if *right != 0 && left.checked_rem(*right) == Some(0) => left.checked_div(*right),
            Math::Div | Math::Rem => None,
        };
        if let Some(whole) = whole {
            return Some(Val::Num(Num::Int(whole)));
        }
    }
    let (left, right) = (Decimal::of(left)?, Decimal::of(right)?);
    let result = match op {
        Math::Add | Math::Sub => {
            let (left, right) = left.same_scale(right);
            let digits = if op == Math::Add { left.digits + right.digits } else { left.digits - right.digits };
            Decimal { digits, scale: left.scale }
        }
        Math::Mul => Decimal { digits: left.digits * right.digits, scale: left.scale + right.scale },
        Math::Div if right.digits.sign() == Sign::NoSign => return None,
        Math::Div => left.divide(right)?,
        Math::Rem => return None,
    };
    Some(result.into_val())
}

/// `left op right` of two numbers of which one is a decimal; `None` where jq's own comparison is right.
pub(super) fn compare(op: Cmp, left: &Num, right: &Num) -> Option<bool> {
    if !matches!((left, right), (Num::Dec(_), _) | (_, Num::Dec(_))) {
        return None;
    }
    let order = Decimal::of(left)?.compare(&Decimal::of(right)?);
    Some(match op {
        Cmp::Lt => order.is_lt(),
        Cmp::Le => order.is_le(),
        Cmp::Gt => order.is_gt(),
        Cmp::Ge => order.is_ge(),
        Cmp::Eq => order.is_eq(),
        Cmp::Ne => order.is_ne(),
    })
}
