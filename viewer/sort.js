// A click on a heading sorts by its column: numbers from the highest, words from the first; the second click
// turns the order round, the third brings back that of the page. A range counts by its first number.
export function sortTables(root) {
  for (const table of root.querySelectorAll('table.sortable')) {
    const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells], before = [...body.rows]
    heads.forEach((head, column) => {
      const text = row => row.cells[column].textContent.trim()
      const form = /^[+-]?[\d,]*\.?\d+(%| to .*)?$/
      const number = word => form.test(word) ? parseFloat(word.replace(/,/g, '')) : NaN
      const words = before.map(text).filter(word => word && word !== '-')
      const numeric = words.length > 0 && words.every(word => !isNaN(number(word)))
      const compare = numeric
        ? (a, b) => number(text(b)) - number(text(a))
        : (a, b) => text(a).localeCompare(text(b), undefined, {numeric: true})
      const orders = numeric ? ['descending', 'ascending'] : ['ascending', 'descending']
      const button = document.createElement('button')
      for (const word of head.textContent.split(' ')) { // a line may end between words, not at a hyphen
        const span = document.createElement('span')
        span.textContent = word
        button.append(button.hasChildNodes() ? ' ' : '', span)
      }
      button.onclick = () => {
        const order = orders[orders.indexOf(head.ariaSort) + 1] || null
        heads.forEach(other => other.removeAttribute('aria-sort'))
        if (order) head.setAttribute('aria-sort', order)
        const blank = row => numeric && isNaN(number(text(row)))
        const rows = before.filter(row => !blank(row)).sort(compare)
        if (order && order !== orders[0]) rows.reverse()
        body.append(...(order ? [...rows, ...before.filter(blank)] : before))
      }
      head.replaceChildren(button)
    })
  }
}
