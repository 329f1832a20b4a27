/** Numbers as people read them. */

const grouped = new Intl.NumberFormat("en");

export const count = (number) => grouped.format(number);
export const tokensOf = (number) => `${count(number)} token${number === 1 ? "" : "s"}`;
export const decimals = (value, digits) => value.toLocaleString("en", { maximumFractionDigits: digits });
export const seconds = (value) => `${decimals(value, value < 1 ? 2 : 1)} s`;
export const percent = (part, whole) => `${Math.floor((100 * part) / Math.max(whole, 1))}%`;

export function bytes(value) {
  const power = Math.min(Math.floor(Math.log10(Math.max(value, 1)) / 3), 4);
  return `${decimals(value / 1000 ** power, power > 1 ? 1 : 0)} ${["B", "kB", "MB", "GB", "TB"][power]}`;
}
